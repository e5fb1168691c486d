"""When to grow: the growth timing guideline of Du et al., Stacking Your Transformers, arXiv 2405.15319."""
import math
from dataclasses import dataclass

from common.files import UserError
from common.settings import non_defaults, setting
from model.config import size_config

FORMULA = "log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, C = 6 N D"
# Models that the guideline is applied to: parameters, tokens, and d in billions of tokens as printed there.
PUBLISHED = {"Llama3-8B": (8e9, 15e12, 6.58), "Llama2-7B": (7e9, 2e12, 11.11), "Llama2-13B": (13e9, 2e12, 15.84),
             "Llama2-70B": (70e9, 2e12, 42.48)}
SPEED_UP = 0.546  # of the published 7B: 300B / 194B tokens for the same loss - 1 (ibid., abstract)
FITTED = 410e6, 3e9  # parameters of the models that the formula was fitted on (ibid., guideline on growth timing)


@dataclass(frozen=True)
class GrowthPlanConfig:
    """Settings of the growth plan."""
    params: float | None = setting(None, "parameters of the grown model, such as 7e9; none: the published examples",
                                   at_least=1, at_most=1e18)
    tokens: float | None = setting(None, "tokens that a model from scratch would be trained on, such as 300e9",
                                   at_least=1, at_most=1e18)
    size: str | None = setting(None, "size preset that gives parameters and depth", names="size")
    num_hidden_layers: int | None = setting(None, "depth of the grown model; none: the size's, or that of a Llama with "
                                                  "as many parameters", at_least=2, at_most=100_000)
    factor: int = setting(4, "growth factor g", at_least=2)

    def problems(self) -> list[str]:
        """Contradictions between settings, as sentences."""
        found = []
        if self.size and self.params is not None:
            found.append("params and size both give the size of the model: give one")
        if (self.size is None and self.params is None) != (self.tokens is None):
            found.append("a plan needs the size of the model (--params or --size) and --tokens")
        given = non_defaults(self, "num_hidden_layers", "factor")
        if self.tokens is None and given:
            found.append(f"{' and '.join(given)} would change nothing without --tokens: give it as well")
        return found


def growth_timing(params: float, tokens: float) -> float:
    """d, the tokens after which to grow the base of a model of `params` parameters that would otherwise be trained on
    `tokens` tokens from scratch, by FORMULA."""
    return 10 ** (0.88 * math.log10(params) + 163.27 / math.log10(6 * params * tokens) - 5.74)


def usual_depth(params: float, factor: int) -> int:
    """The depth of a Llama with `params` parameters, as a multiple of `factor`: 12 L C² parameters with C = 128 L, the
    proportions of Llama 7B (32 layers of 4,096) and 13B (40 of 5,120)."""
    return max(1, round((params / (12 * 128 ** 2)) ** (1 / 3) / factor)) * factor


def grown_and_base(cfg: GrowthPlanConfig) -> tuple[float, float, int]:
    """(parameters of the grown model, parameters of the base, depth of the grown model)."""
    grown = size_config(cfg.size, cfg.num_hidden_layers) if cfg.size else None
    params = float(grown.num_parameters if grown else cfg.params or 0)
    depth = grown.num_hidden_layers if grown else cfg.num_hidden_layers or usual_depth(params, cfg.factor)
    if depth % cfg.factor:
        raise UserError(f"{depth} layers are not a multiple of the factor {cfg.factor}: choose another of the two")
    if grown:
        return params, grown.with_layers(range(depth // cfg.factor)).num_parameters, depth
    return params, params / cfg.factor, depth


def print_growth_plan(cfg: GrowthPlanConfig) -> None:
    """Prints when to grow and from what depth, and what that costs and saves."""
    print(f"growth timing: {FORMULA}\n"
          "(Du et al., arXiv 2405.15319; N parameters, D tokens from scratch, d tokens of the base before growth)")
    if cfg.tokens is None:
        print(f"{'model':<12}{'N':>8}{'D':>8}{'d':>10}{'d published':>13}")
        for name, (params, tokens, published) in PUBLISHED.items():
            print(f"{name:<12}{params / 1e9:>7.0f}B{tokens / 1e12:>7.0f}T{growth_timing(params, tokens) / 1e9:>9.2f}B"
                  f"{published:>12.2f}B")
        return
    params, base_params, depth = grown_and_base(cfg)
    d, scratch = growth_timing(params, cfg.tokens), 6 * params * cfg.tokens
    base_flops, same_loss = 6 * base_params * d, scratch / (1 + SPEED_UP)
    assumed = "" if cfg.size or cfg.num_hidden_layers else " (Llama's proportions; --num_hidden_layers sets them)"
    rows = [("model N", f"{params:.4g} parameters, {depth} layers{assumed}"),
            ("growth factor g", f"{cfg.factor} (2 to 4 are near the optimum)"),
            ("base", f"{base_params:.4g} parameters, {depth // cfg.factor} layers" + ("" if cfg.size else " (N / g)")),
            ("growth timing d", f"{d:.4g} tokens ({d / 1e9:.2f}B)"),
            ("from scratch", f"{scratch:.4g} FLOPs: {cfg.tokens:.4g} tokens")]
    if base_flops < scratch:
        rows.append(("grown, same FLOPs", f"{scratch:.4g} FLOPs: {base_flops:.4g} for the base "
                                          f"({base_flops / scratch:.2%}), then "
                                          f"{(scratch - base_flops) / (6 * params):.4g} tokens"))
    if base_flops < same_loss:
        rows += [("grown, same loss", f"{same_loss:.4g} FLOPs with the base, if it gains what the published 7B gained "
                                      f"(C_scratch / C_grown - 1 = {SPEED_UP:.1%} at 300B tokens)"),
                 ("expected saving", f"{scratch - same_loss:.4g} FLOPs, {1 - same_loss / scratch:.1%}")]
    for name, text in rows:
        print(f"{name:<18} {text}")
    fitted = f"the formula was fitted at {FITTED[0] / 1e9:.2f}B to {FITTED[1] / 1e9:.0f}B parameters"
    if base_flops >= same_loss:
        print(f"warning: the base alone would cost {base_flops:.4g} FLOPs, so that growing saves nothing; {fitted} and "
              "does not extend to this model or to so few tokens: spend a quarter of the FLOPs on the base instead, as "
              "configs/size/study.toml does")
    elif not FITTED[0] <= params <= FITTED[1]:
        print(f"note: {fitted}; this N is outside that range")
