"""Architectures as ordinary PyTorch modules: readable source, and modules made of it."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from tests.fuzz.architecture import MAX_LENGTH_TOKENS, VOCAB, Architecture
from tests.fuzz.source_attention import attention_class
from tests.fuzz.source_mlp import mlp_class, moe_class
from tests.fuzz.source_positions import layer_masks, masks_of, positions_of, rotary_class
from tests.fuzz.writing import class_of, code
from tests.models.stock import draw_weights

__all__ = ["imported", "made", "source_of"]

_numbers = itertools.count()


def source_of(a: Architecture) -> str:
    """A module whose `Model()` maps ids [batch, tokens] to logits [batch, tokens, VOCAB]."""
    pieces = [
        _constants(a),
        _linear_class(a),
        _norm_classes(a),
        rotary_class(a),
        _functions(a),
        attention_class(a),
        mlp_class(a),
        moe_class(a),
        _block_class(a),
        _output_class(a),
        _model_class(a),
    ]
    head = "import math\nfrom dataclasses import dataclass\n\nimport torch"
    imports = f"{head}\nimport torch.nn.functional as F\nfrom torch import Tensor, nn"
    return imports + "\n\n" + "\n\n\n".join(piece for piece in pieces if piece) + "\n"


@contextlib.contextmanager
def imported(source: str) -> Iterator[ModuleType]:
    """The module of a source, from a file that exists meanwhile, so that traces have lines."""
    name = f"fuzzed_{next(_numbers)}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # Dynamo imports it by name
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            del sys.modules[name]


def made(module: ModuleType, seed: int) -> nn.Module:
    """The module's `Model` in eval mode, its weights large enough that attention matters."""
    model: nn.Module = module.Model()
    draw_weights(model, torch.Generator().manual_seed(seed))
    return model.eval()


def _constants(a: Architecture) -> str:
    return code(
        f"VOCAB, LAYERS, HIDDEN, INNER = {VOCAB}, {a.layers}, {a.hidden}, {2 * a.hidden}",
        f"HEADS, KV_HEADS, GROUPS = {a.heads}, {a.kv_heads}, {a.groups}",
        f"HEAD_DIM, VALUE_DIM = {a.head_dim}, {a.value_dim}",
        "SCALE = HEAD_DIM**-0.5",
        f"MAX_LENGTH = {MAX_LENGTH_TOKENS}",
        "LOWEST = torch.finfo(torch.float32).min",
        f"ROTARY_DIM = {int(a.head_dim * a.rope_fraction)}" if a.position == "rope" else "",
        f"WINDOW = {a.window_tokens}" if a.window else "",
        "SCORE_CAP = 5.0" if a.score_cap else "",
        "LOGIT_CAP = 8.0" if a.logit_cap else "",
        "EXPERTS, CHOSEN = 4, 2" if a.moe else "",
    )


def _linear_class(a: Architecture) -> str:
    if a.product == "linear":
        return "Linear = nn.Linear"
    product = {
        "matmul": "y = x @ self.weight",
        "einsum": 'y = torch.einsum("...i,io->...o", x, self.weight)',
        "addmm": """
            flat = x.reshape(-1, x.shape[-1])
            if self.bias is None:
                return torch.mm(flat, self.weight).view(*x.shape[:-1], -1)
            return torch.addmm(self.bias, flat, self.weight).view(*x.shape[:-1], -1)
        """,
    }[a.product]
    end = "" if a.product == "addmm" else "return y if self.bias is None else y + self.bias"
    return class_of(
        "Linear(nn.Module)",
        '"""x w + b, w [inputs, outputs]."""',
        """
        def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(inputs, outputs))
            self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        """,
        code("def forward(self, x: Tensor) -> Tensor:", code(product, end, indent=1)),
    )


def _norm_classes(a: Architecture) -> str:
    """`Norm`, of the residual stream, and `RMSNorm`, which queries and keys have."""
    init = """
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(width))
    """
    functional = """
        def forward(self, x: Tensor) -> Tensor:
            return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)
    """
    gain = "1.0 + self.weight" if a.norm == "gemma" else "self.weight"
    by_hand = f"""
        def forward(self, x: Tensor) -> Tensor:
            wide = x.to(torch.float32)
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
            return ({gain}) * wide.to(x.dtype)
    """
    if a.norm == "module_rmsnorm":
        return "RMSNorm = Norm = nn.RMSNorm"
    forward = functional if a.norm == "functional_rmsnorm" else by_hand
    rms = class_of("RMSNorm(nn.Module)", init, forward)
    return rms + "\n\n\n" + ("Norm = nn.LayerNorm" if a.norm == "layernorm" else "Norm = RMSNorm")


def _functions(a: Architecture) -> str:
    found = []
    if a.position == "rope" and a.rope_style == "half":
        found.append("""
            def rotate_half(x: Tensor) -> Tensor:
                first, second = x.chunk(2, dim=-1)
                return torch.cat([-second, first], dim=-1)
        """)
    if a.position == "rope" and a.rope_style == "interleaved":
        found.append("""
            def rotate_interleaved(x: Tensor) -> Tensor:
                return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        """)
    if a.grouping == "expand" and a.groups > 1:
        found.append("""
            def repeat_heads(x: Tensor) -> Tensor:
                batch, heads, length, width = x.shape
                wide = x[:, :, None].expand(batch, heads, GROUPS, length, width)
                return wide.reshape(batch, heads * GROUPS, length, width)
        """)
    return "\n\n\n".join(code(function) for function in found)


def _block_class(a: Architecture) -> str:
    norms = ["norm", *(["mlp_norm"] if not a.parallel else [])]
    if a.norm_place == "sandwich":
        norms += ["after_norm", "after_mlp_norm"]
    gains = ""
    if a.layer_scale == "weight":
        gains = """
            self.gain = nn.Parameter(torch.empty(HIDDEN))
            self.mlp_gain = nn.Parameter(torch.empty(HIDDEN))
        """
    init = code(
        "super().__init__()",
        "self.attention = Attention()",
        f"self.mlp = {'Experts' if a.moe else 'MLP'}()",
        "\n".join(f"self.{name} = Norm(HIDDEN)" for name in norms),
        gains,
        indent=1,
    )
    return class_of(
        "Block(nn.Module)",
        code("def __init__(self) -> None:", init),
        code(
            "def forward(self, x: Tensor, mask, rotation, ids, attention_mask) -> Tensor:",
            code(_block_body(a), indent=1),
        ),
    )


def _block_body(a: Architecture) -> str:
    inputs = "mask, rotation, ids, attention_mask"
    gain = {"number": " * 0.7", "weight": " * self.gain", None: ""}[a.layer_scale]
    mlp_gain = gain.replace("gain", "mlp_gain")
    pre = a.norm_place != "post"
    source = "self.norm(x)" if pre else "x"
    attended, after = f"self.attention({source}, {inputs})", "self.mlp({})"
    if a.norm_place == "sandwich":
        attended, after = f"self.after_norm({attended})", "self.after_mlp_norm(self.mlp({}))"
    if a.parallel:
        both = f"x + {attended}{gain} + {after.format(source)}{mlp_gain}"
        return f"return {both}" if pre else f"return self.norm({both})"
    if pre:
        return code(
            f"x = x + {attended}{gain}", f"return x + {after.format('self.mlp_norm(x)')}{mlp_gain}"
        )
    return code(
        f"x = self.norm(x + {attended}{gain})",
        f"return self.mlp_norm(x + {after.format('x')}{mlp_gain})",
    )


def _output_class(a: Architecture) -> str:
    if a.output != "dataclass":
        return ""
    return "@dataclass\n" + class_of("Output", "logits: Tensor\nloss: Tensor | None = None")


def _model_class(a: Architecture) -> str:
    return class_of("Model(nn.Module)", _model_init(a), masks_of(a), _model_forward(a))


def _model_init(a: Architecture) -> str:
    positions = {
        "learned": "self.positions = nn.Embedding(MAX_LENGTH, HIDDEN)",
        "relative": "self.relative = nn.Embedding(2 * MAX_LENGTH, HEADS)",
        "rope": "self.rotary = Rotary()" if a.position_table != "layer" else "",
    }.get(a.position, "")
    index = ""
    if a.position == "learned" and a.position_table == "buffer":
        index = 'self.register_buffer("indices", torch.arange(MAX_LENGTH)[None])'
    head = ""
    if a.head == "bert":
        head = "self.transform = nn.Sequential(Linear(HIDDEN, HIDDEN), nn.GELU(), Norm(HIDDEN))"
    decoder = "" if a.tied else f"self.decoder = Linear(HIDDEN, VOCAB, {a.bias})"
    return code(
        "def __init__(self) -> None:",
        code(
            "super().__init__()",
            "self.embedding = nn.Embedding(VOCAB, HIDDEN)",
            positions,
            index,
            "self.embedding_norm = Norm(HIDDEN)" if a.embedding_norm else "",
            "self.layers = nn.ModuleList(Block() for _ in range(LAYERS))",
            "self.norm = Norm(HIDDEN)" if a.norm_place != "post" else "",
            head,
            decoder,
            indent=1,
        ),
    )


def _model_forward(a: Architecture) -> str:
    table = code(positions_of(a), "x = x + self.positions(positions)")
    if a.position_table == "buffer" and a.position_ids == "arange":
        table = "x = x + self.positions(self.indices[:, : ids.shape[1]])"
    added = {
        "learned": table,
        "sinusoidal": code(
            positions_of(a),
            """
            rates = torch.arange(HIDDEN // 2, device=ids.device).float() / (HIDDEN // 2)
            turns = positions[..., None].float() * 50.0**-rates
            x = x + torch.cat([turns.sin(), turns.cos()], dim=-1)
            """,
        ),
    }.get(a.position, "")
    shared = a.position == "rope" and a.position_table != "layer"
    rotation = f"rotation = {'self.rotary(ids, attention_mask)' if shared else 'None'}"
    masks, of_layer = layer_masks(a)
    return code(
        "def forward(self, ids: Tensor, attention_mask: Tensor | None = None):",
        code(
            "x = self.embedding(ids)",
            "x = x * math.sqrt(HIDDEN)" if a.embedding_scale else "",
            added,
            "x = self.embedding_norm(x)" if a.embedding_norm else "",
            rotation,
            masks,
            "for at, layer in enumerate(self.layers):",
            code(f"x = layer(x, {of_layer}, rotation, ids, attention_mask)", indent=1),
            "x = self.norm(x)" if a.norm_place != "post" else "",
            "x = self.transform(x)" if a.head == "bert" else "",
            _logits(a),
            indent=1,
        ),
    )


def _logits(a: Architecture) -> str:
    logits = "logits = self.decoder(x)"
    if a.tied:
        logits = {
            "linear": "logits = F.linear(x, self.embedding.weight)",
            "einsum": 'logits = torch.einsum("bth,vh->btv", x, self.embedding.weight)',
        }.get(a.product, "logits = x @ self.embedding.weight.T")
    cap = "logits = LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)" if a.logit_cap else ""
    shift = {
        "cat": "logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)",
        "roll": "logits = logits.roll(1, dims=1)",
        None: "",
    }[a.shift]
    result = {"tensor": "logits", "tuple": "(logits,)", "dataclass": "Output(logits=logits)"}
    return code(logits, cap, shift, f"return {result[a.output]}")
