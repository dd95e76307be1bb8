from collections.abc import Sequence

def partial_posterior(
    *,
    engine: str,
    pixels: int,
    is_uint8: bool,
    bank_shape: Sequence[int],
    order: int,
    queries: int,
    x: int,
    alpha: int,
    sigma: int,
    begin: int,
    end: int,
    window: int,
    sources: int,
    patch_size: int,
    threads: int,
    full: bool,
    out: Sequence[int],
) -> None: ...
def available_isas() -> list[str]: ...
def isa_in_use() -> str: ...
