"""The dtypes of weights by their names in settings."""
import torch

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # by their names in settings


def resolve_dtype(dtype: str) -> str:
    """"bf16" or "fp32"; "auto" becomes bf16 if the hardware multiplies bf16 matrices."""
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities()
    return "bf16" if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"
