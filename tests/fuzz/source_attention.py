"""The attention layer of an architecture, as source code."""

from __future__ import annotations

from tests.fuzz.architecture import Architecture
from tests.fuzz.writing import class_of, code

__all__ = ["attention_class"]


def attention_class(a: Architecture) -> str:
    """`Attention(window)`; its `attend` holds the site, for the oracle to answer."""
    return class_of(
        "Attention(nn.Module)",
        '"""[batch, tokens, HIDDEN] to the same."""',
        _init(a),
        _project(a),
        _rotate(a),
        _attend(a),
        _forward(a),
    )


def _init(a: Architecture) -> str:
    width = "HEADS * HEAD_DIM + KV_HEADS * (HEAD_DIM + VALUE_DIM)"
    if a.qkv == "separate":
        layers = f"""
            self.q_proj = Linear(HIDDEN, HEADS * HEAD_DIM, {a.bias})
            self.k_proj = Linear(HIDDEN, KV_HEADS * HEAD_DIM, {a.bias})
            self.v_proj = Linear(HIDDEN, KV_HEADS * VALUE_DIM, {a.bias})
        """
    else:
        layers = f"self.Wqkv = Linear(HIDDEN, {width}, {a.bias})"
    norms = ""
    if a.qk_norm is not None:
        whole = a.qk_norm == "full"
        norms = f"""
            self.q_norm = RMSNorm({"HEADS * HEAD_DIM" if whole else "HEAD_DIM"})
            self.k_norm = RMSNorm({"KV_HEADS * HEAD_DIM" if whole else "HEAD_DIM"})
        """
    rotary = "self.rotary = Rotary()" if a.position_table == "layer" and _rotates(a) else ""
    dropout = "self.dropout = nn.Dropout(0.1)" if a.dropout and a.attention != "sdpa" else ""
    return code(
        "def __init__(self) -> None:",
        code(
            "super().__init__()",
            layers,
            "self.out = Linear(HEADS * VALUE_DIM, HIDDEN, " + str(a.bias) + ")",
            norms,
            rotary,
            dropout,
            indent=1,
        ),
    )


def _rotates(a: Architecture) -> bool:
    return a.position == "rope"


def _project(a: Architecture) -> str:
    """Queries, keys and values as [batch, tokens, heads, width]."""
    fused = {
        "split": """
            widths = [HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * VALUE_DIM]
            q, k, v = self.Wqkv(x).split(widths, dim=-1)
        """,
        "chunk": "q, k, v = self.Wqkv(x).chunk(3, dim=-1)",
        "unbind": "q, k, v = self.Wqkv(x).view(*x.shape[:2], 3, HEADS, HEAD_DIM).unbind(2)",
        "per_head": """
            q, k, v = self.Wqkv(x).view(*x.shape[:2], HEADS, 3 * HEAD_DIM).chunk(3, dim=-1)
        """,
        "separate": "q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)",
    }[a.qkv]
    with_heads = a.qkv in ("unbind", "per_head")
    flatten = "q, k = q.flatten(2), k.flatten(2)" if with_heads and a.qk_norm == "full" else ""
    whole = "q, k = self.q_norm(q), self.k_norm(k)" if a.qk_norm == "full" else ""
    views = """
        q = q.reshape(*x.shape[:2], HEADS, HEAD_DIM)
        k = k.reshape(*x.shape[:2], KV_HEADS, HEAD_DIM)
    """
    values = "v = v.reshape(*x.shape[:2], KV_HEADS, VALUE_DIM)"
    by_head = "q, k = self.q_norm(q), self.k_norm(k)" if a.qk_norm == "head" else ""
    return code(
        "def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:",
        code(
            fused,
            flatten,
            whole,
            "" if with_heads and not flatten else views,
            "" if with_heads else values,
            by_head,
            "return q, k, v",
            indent=1,
        ),
    )


def _rotate(a: Architecture) -> str:
    """The rotation of [batch, heads, tokens, d] or [batch, tokens, heads, d]."""
    if not _rotates(a):
        return ""
    axis = 1 if a.rope_place == "heads_first" else 2
    if a.rope_style == "complex":
        body = f"""
            turned = torch.view_as_complex(x[..., :ROTARY_DIM].float().unflatten(-1, (-1, 2)))
            turned = torch.view_as_real(turned * rotation.unsqueeze({axis})).flatten(-2)
        """
    else:
        body = f"""
            cos, sin = rotation
            cos, sin = cos.unsqueeze({axis}), sin.unsqueeze({axis})
            part = x[..., :ROTARY_DIM]
            turned = part * cos + rotate_{a.rope_style}(part) * sin
        """
    rest = "return turned.to(x.dtype)"
    if a.rope_fraction != 1.0:
        rest = "return torch.cat([turned.to(x.dtype), x[..., ROTARY_DIM:]], dim=-1)"
    return code("def rotate(self, x: Tensor, rotation) -> Tensor:", code(body, rest, indent=1))


def _attend(a: Architecture) -> str:
    repeat = {
        "repeat_interleave": """
            k = k.repeat_interleave(GROUPS, dim=1)
            v = v.repeat_interleave(GROUPS, dim=1)
        """,
        "expand": "k, v = repeat_heads(k), repeat_heads(v)",
        "enable_gqa": "",
    }[a.grouping]
    if a.groups == 1 or a.attention == "grouped_einsum":
        repeat = ""
    if a.attention == "sdpa":
        body = _sdpa(a)
    else:
        body = code(_scores(a), _cap_and_mask(a), _softmax(a), _weighted(a))
    return code(
        "def attend(self, q, k, v, mask=None, scale=1.0) -> Tensor:",
        code(repeat, body, indent=1),
    )


def _sdpa(a: Architecture) -> str:
    grouped = ", enable_gqa=True" if a.grouping == "enable_gqa" and a.groups > 1 else ""
    default = a.scaling == "mul" and not grouped
    scale = "" if default else ", scale=scale"
    call = f"F.scaled_dot_product_attention(q, k, v, attn_mask=mask{scale}{grouped})"
    return f"return {call}"


def _scores(a: Architecture) -> str:
    scale = "* scale" if a.scaling != "div" else "/ (1 / scale)"
    plain = {
        "einsum": f'scores = torch.einsum("bhqd,bhkd->bhqk", q, k) {scale}',
        "einsum_tokens_first": (
            'scores = torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2))'
            f" {scale}"
        ),
        "grouped_einsum": f"""
            q = q.unflatten(1, (KV_HEADS, GROUPS))
            scores = torch.einsum("bkgqd,bksd->bkgqs", q, k) {scale}
        """,
        "bmm": f"""
            batch, _, length, _ = q.shape
            keys = k.reshape(batch * HEADS, length, HEAD_DIM).transpose(1, 2)
            scores = torch.bmm(q.reshape(batch * HEADS, length, HEAD_DIM), keys) {scale}
            scores = scores.view(batch, HEADS, length, length)
        """,
        "baddbmm": """
            batch, _, length, _ = q.shape
            queries = q.reshape(batch * HEADS, length, HEAD_DIM)
            keys = k.reshape(batch * HEADS, length, HEAD_DIM)
            nothing = torch.zeros(1, 1, 1, dtype=q.dtype, device=q.device)
            scores = torch.baddbmm(nothing, queries, keys.transpose(1, 2), beta=0, alpha=scale)
            scores = scores.view(batch, HEADS, length, length)
        """,
    }
    return plain.get(a.attention, f"scores = q @ k.transpose(-2, -1) {scale}")


def _cap_and_mask(a: Architecture) -> str:
    cap = "scores = SCORE_CAP * torch.tanh(scores / SCORE_CAP)" if a.score_cap else ""
    if a.attention == "grouped_einsum":
        mask = {
            "additive": "scores = scores + mask[:, :, None]",
            "bool": "scores = torch.where(mask[:, :, None], scores, LOWEST)",
            "masked_fill": "scores = scores.masked_fill(~mask[:, :, None], LOWEST)",
        }[mask_form(a)]
    else:
        mask = {
            "additive": "scores = scores + mask",
            "bool": "scores = torch.where(mask, scores, LOWEST)",
            "masked_fill": "scores = scores.masked_fill(~mask, LOWEST)",
        }[mask_form(a)]
    return code(cap, "if mask is not None:", code(mask, indent=1))


def mask_form(a: Architecture) -> str:
    """How the mask reaches the scores: a bias of numbers can only be added."""
    return "additive" if a.position in ("alibi", "relative") else a.mask_form


def _softmax(a: Architecture) -> str:
    if a.attention == "exp":
        body = """
            powers = torch.exp(scores - scores.amax(-1, keepdim=True))
            weights = powers / powers.sum(-1, keepdim=True)
        """
    elif a.softmax_dtype == "float32":
        body = "weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)"
    else:
        body = "weights = scores.softmax(-1)"
    return code(body, "weights = self.dropout(weights)" if a.dropout else "")


def _weighted(a: Architecture) -> str:
    flattened = """
        weights = weights.view(batch * HEADS, length, length)
        values = v.reshape(batch * HEADS, length, VALUE_DIM)
        return torch.bmm(weights, values).view(batch, HEADS, length, VALUE_DIM)
    """
    return {
        "einsum": 'return torch.einsum("bhqk,bhkd->bhqd", weights, v)',
        "einsum_tokens_first": """
            rows = torch.einsum("bhqk,bkhd->bqhd", weights, v.transpose(1, 2))
            return rows.transpose(1, 2)
        """,
        "grouped_einsum": """
            return torch.einsum("bkgqs,bksd->bkgqd", weights, v).flatten(1, 2)
        """,
        "bmm": flattened,
        "baddbmm": flattened,
    }.get(a.attention, "return weights @ v")


def _forward(a: Architecture) -> str:
    turn = "q, k = self.rotate(q, rotation), self.rotate(k, rotation)" if _rotates(a) else ""
    own = "rotation = self.rotary(ids, attention_mask)" if a.position_table == "layer" else ""
    own = own if _rotates(a) else ""
    heads_first = a.rope_place == "heads_first"
    scaled, scale = "", "SCALE"
    if a.scaling == "query":
        scaled, scale = "q = q * SCALE", "1.0"
    if a.scaling == "both":
        scaled, scale = "q, k = q * math.sqrt(SCALE), k * math.sqrt(SCALE)", "1.0"
    return code(
        "def forward(self, x: Tensor, mask, rotation, ids, attention_mask) -> Tensor:",
        code(
            own,
            "q, k, v = self.project(x)",
            "" if heads_first else turn,
            "q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)",
            turn if heads_first else "",
            scaled,
            f"rows = self.attend(q, k, v, mask, {scale})",
            "return self.out(rows.transpose(1, 2).reshape(*x.shape[:2], HEADS * VALUE_DIM))",
            indent=1,
        ),
    )
