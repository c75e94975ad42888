"""The MLP and the mixture of experts of an architecture, as source code."""

from __future__ import annotations

from tests.fuzz.architecture import Architecture
from tests.fuzz.writing import class_of, code

__all__ = ["mlp_class", "moe_class"]

ACTIVATIONS = {
    "gelu": "F.gelu(up)",
    "relu_squared": "F.relu(up).square()",
    "swiglu": "F.silu(gate) * up",
    "geglu": 'F.gelu(gate, approximate="tanh") * up',
}


def mlp_class(a: Architecture) -> str:
    gated = a.mlp in ("swiglu", "geglu")
    fused = gated and a.gate_up != "separate"
    layers = f"self.up = Linear(HIDDEN, INNER, {a.bias})"
    if fused:
        layers = f"self.gate_up = Linear(HIDDEN, 2 * INNER, {a.bias})"
    elif gated:
        layers += f"\nself.gate = Linear(HIDDEN, INNER, {a.bias})"
    parts = "up = self.up(x)" if not gated else "gate, up = self.gate(x), self.up(x)"
    if fused:
        parts = {
            "chunk": "gate, up = self.gate_up(x).chunk(2, dim=-1)",
            "split": "gate, up = self.gate_up(x).split(INNER, dim=-1)",
            "interleaved": """
                both = self.gate_up(x)
                gate, up = both[..., ::2], both[..., 1::2]
            """,
        }[a.gate_up]
    merge = "batch, length, _ = x.shape\nx = x.view(-1, HIDDEN)" if a.flatten else ""
    back = ".view(batch, length, HIDDEN)" if a.flatten else ""
    return class_of(
        "MLP(nn.Module)",
        code(
            "def __init__(self) -> None:",
            code(
                "super().__init__()", layers, f"self.down = Linear(INNER, HIDDEN, {a.bias})",
                indent=1,
            ),
        ),
        code(
            "def forward(self, x: Tensor) -> Tensor:",
            code(merge, parts, f"return self.down({ACTIVATIONS[a.mlp]}){back}", indent=1),
        ),
    )  # fmt: skip


def moe_class(a: Architecture) -> str:
    if a.moe is None:
        return ""
    bias = "self.router_bias = nn.Parameter(torch.empty(EXPERTS))" if a.moe == "sigmoid" else ""
    init = code(
        "super().__init__()",
        "self.router = Linear(HIDDEN, EXPERTS, False)",
        "self.up = nn.Parameter(torch.empty(EXPERTS, HIDDEN, INNER))",
        "self.down = nn.Parameter(torch.empty(EXPERTS, INNER, HIDDEN))",
        bias,
        "self.shared = MLP()" if a.shared_expert else "",
        indent=1,
    )
    shared = "self.shared(x) + " if a.shared_expert else ""
    every = """
        inner = F.silu(torch.einsum("bth,ehi->btei", x, self.up))
        outputs = torch.einsum("btei,eih->bteh", inner, self.down)
    """
    weighed = f"return {shared}(weights[..., None] * outputs).sum(2)"
    chosen = "values, chosen = self.router(x).softmax(-1).topk(CHOSEN, dim=-1)"
    one_hot = "weights = (F.one_hot(chosen, EXPERTS) * values[..., None]).sum(2)"
    body = {
        "soft": code(every, "weights = self.router(x).softmax(-1)", weighed),
        "mask": code(every, chosen, one_hot, weighed),
        "scatter": code(
            every,
            "scores = self.router(x)",
            "values, chosen = scores.topk(CHOSEN, dim=-1)",
            "weights = torch.zeros_like(scores).scatter(-1, chosen, values.softmax(-1))",
            weighed,
        ),
        "sigmoid": code(
            every,
            "scores = self.router(x).sigmoid()",
            "chosen = (scores + self.router_bias).topk(CHOSEN, dim=-1).indices",
            "values = scores.gather(-1, chosen)",
            "values = values / values.sum(-1, keepdim=True)",
            one_hot,
            weighed,
        ),
        "gather": f"""
            batch, length, _ = x.shape
            tokens = x.reshape(-1, HIDDEN)
            values, chosen = self.router(tokens).softmax(-1).topk(CHOSEN, dim=-1)
            inner = F.silu(torch.einsum("nh,nkhi->nki", tokens, self.up[chosen]))
            outputs = torch.einsum("nki,nkih->nkh", inner, self.down[chosen])
            outputs = (values[..., None] * outputs).sum(1)
            return {shared}outputs.view(batch, length, HIDDEN)
        """,
    }[a.moe]
    return class_of(
        "Experts(nn.Module)",
        code("def __init__(self) -> None:", init),
        code("def forward(self, x: Tensor) -> Tensor:", code(body, indent=1)),
    )
