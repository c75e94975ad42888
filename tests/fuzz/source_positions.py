"""Positions and masks of an architecture, as source code: what is made of lengths and ids alone."""

from __future__ import annotations

from tests.fuzz.architecture import Architecture
from tests.fuzz.source_attention import mask_form
from tests.fuzz.writing import class_of, code

__all__ = ["layer_masks", "masks_of", "positions_of", "rotary_class"]


def rotary_class(a: Architecture) -> str:
    if a.position != "rope":
        return ""
    buffered = a.position_table == "buffer"
    init = """
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", angles(torch.arange(MAX_LENGTH), MAX_LENGTH))
    """
    look_up = "turns = angles(positions, length)"
    if buffered:
        look_up = "turns = self.table[positions]"
    if buffered and a.position_ids == "arange":
        look_up = "turns = self.table[None, :length]"
    form = "return turns.cos() * FACTOR, turns.sin() * FACTOR"
    if a.rope_style == "complex":
        form = "return torch.polar(torch.full_like(turns, FACTOR), turns)"
    forward = code(
        "def forward(self, ids: Tensor, attention_mask: Tensor | None = None):",
        code(
            "length = ids.shape[1]",
            "" if look_up.endswith(":length]") else positions_of(a),
            look_up,
            form,
            indent=1,
        ),
    )
    factor = "1.1" if a.rope_scaling == "blended" else "1.0"
    what = "the rotation" if a.rope_style == "complex" else "cos and sin"
    rotary = class_of(
        "Rotary(nn.Module)",
        f'"""{what} of every position, [1 or batch, tokens, width]."""',
        init if buffered else "",
        forward,
    )
    return f"FACTOR = {factor}\n\n\n{_angles(a)}\n\n\n{rotary}"


def _angles(a: Architecture) -> str:
    base = {
        "ntk": "base = 100.0 * 2.0 ** (ROTARY_DIM / max(ROTARY_DIM - 2, 1))",
        "dynamic": """
            base = 100.0
            if length > 8:
                base = base * (2.0 * length / 8 - 1) ** (ROTARY_DIM / max(ROTARY_DIM - 2, 1))
        """,
    }.get(a.rope_scaling or "", "base = 100.0")
    blend = """
        keep = torch.linspace(1, 0, ROTARY_DIM // 2, device=positions.device)
        frequencies = frequencies * keep + frequencies / 4 * (1 - keep)
    """
    twice = {
        "half": "return torch.cat([turns, turns], dim=-1)",
        "interleaved": "return turns.repeat_interleave(2, dim=-1)",
        "complex": "return turns",
    }[a.rope_style]
    return code(
        "def angles(positions: Tensor, length: int) -> Tensor:",
        code(
            base,
            "steps = torch.arange(0, ROTARY_DIM, 2, device=positions.device).float()",
            "frequencies = 1.0 / base ** (steps / ROTARY_DIM)",
            blend if a.rope_scaling == "blended" else "",
            "positions = positions / 2.0" if a.rope_scaling == "linear" else "",
            "turns = positions[..., None].float() * frequencies",
            twice,
            indent=1,
        ),
    )


def positions_of(a: Architecture) -> str:
    """`positions` [1 or batch, tokens]."""
    counted = "positions = torch.arange(ids.shape[1], device=ids.device)[None]"
    if a.position_ids == "arange":
        return counted
    return code(
        counted,
        """
        if attention_mask is not None:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        """,
    )


def masks_of(a: Architecture) -> str:
    """`mask(ids, attention_mask, windowed)`: None, bool, or added to the scores."""
    if not (a.padding or a.block_causal or a.window or mask_is_biased(a)):
        return ""
    distance = """
        rows = torch.arange(ids.shape[1], device=ids.device)
        distance = rows[:, None] - rows[None, :]
    """
    square = "torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device)"
    window = "near = distance.abs() <= WINDOW"
    if a.window_form == "band":
        window = f"near = {square}.tril(WINDOW).triu(-WINDOW)"
    windowed = code(
        "if windowed:",
        code(window, "keep = near[None, None] if keep is None else keep & near", indent=1),
    )
    padding = """
        if attention_mask is not None:
            keep = attention_mask[:, None, None, :].bool()
    """
    return code(
        "def mask(self, ids: Tensor, attention_mask, windowed: bool) -> Tensor | None:",
        code(
            distance if a.window or mask_is_biased(a) else "",
            "keep = attention_mask" if a.block_causal else "keep = None",
            padding if a.padding else "",
            windowed if a.window else "",
            _bias(a),
            "if keep is None:",
            code("return " + ("bias" if mask_is_biased(a) else "None"), indent=1),
            _masked_form(a),
            indent=1,
        ),
    )


def mask_is_biased(a: Architecture) -> bool:
    return a.position in ("alibi", "relative")


def _bias(a: Architecture) -> str:
    """`bias` [1, HEADS, tokens, tokens]."""
    return {
        "alibi": """
            slopes = 2.0 ** -torch.arange(1, HEADS + 1, device=ids.device).float()
            bias = -slopes[None, :, None, None] * distance.abs()
        """,
        "relative": "bias = self.relative(distance + MAX_LENGTH).permute(2, 0, 1)[None]",
    }.get(a.position, "")


def _masked_form(a: Architecture) -> str:
    if mask_is_biased(a):
        return {
            "additive": "return bias + (1.0 - keep.float()) * LOWEST",
            "bool": "return torch.where(keep, bias, LOWEST)",
            "masked_fill": "return bias.masked_fill(~keep, LOWEST)",
        }[a.mask_form]
    if mask_form(a) == "additive":
        return "return (1.0 - keep.float()) * LOWEST"
    if a.attention == "sdpa" and a.mask_form == "masked_fill":
        return "return torch.zeros(keep.shape, device=ids.device).masked_fill(~keep, LOWEST)"
    return "return keep"


def layer_masks(a: Architecture) -> tuple[str, str]:
    """Code that makes the masks, and the mask of layer `at`."""
    if not masks_of(a):
        return "", "None"
    if a.window == "alternate":
        made = "masks = [self.mask(ids, attention_mask, windowed) for windowed in (False, True)]"
        return made, "masks[at % 2]"
    return f"mask = self.mask(ids, attention_mask, {a.window == 'all'})", "mask"
