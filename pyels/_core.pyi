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
    list_count: int = 0,
    list_directions: int = 0,
    lists: Sequence[int] = (),
    tolerance: float = 0.0,
) -> None: ...
def describe_lists(
    *,
    pixels: int,
    is_uint8: bool,
    bank_shape: Sequence[int],
    patch_size: int,
    threads: int,
    list_count: int,
    list_directions: int,
    lists: Sequence[int],
) -> None: ...
def available_isas() -> list[str]: ...
def isa_in_use() -> str: ...

LIST_INTERVAL: float
LIST_BLOCK: int
