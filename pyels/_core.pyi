from collections.abc import Sequence

from typing_extensions import TypedDict, Unpack

class _Queries(TypedDict):
    pixels: int
    is_uint8: bool
    bank_shape: Sequence[int]
    order: int
    queries: int
    x: int
    alpha: int
    sigma: int
    begin: int
    end: int
    window: int
    sources: int
    patch_size: int
    threads: int
    full: bool
    tensor_cores: bool

def partial_posterior(
    *,
    engine: str,
    out: Sequence[int],
    **queries: Unpack[_Queries],
) -> None: ...
def sampled_posterior(
    *,
    out: Sequence[int],
    list_count: int,
    list_directions: int,
    lists: Sequence[int],
    tolerance: float,
    **queries: Unpack[_Queries],
) -> None: ...
def cuda_driver_lacks() -> int: ...
def cuda_workspace(
    *,
    device: int,
    **queries: Unpack[_Queries],
) -> int: ...
def cuda_posterior(
    *,
    out: Sequence[int],
    workspace: int,
    device: int,
    stream: int,
    **queries: Unpack[_Queries],
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

HAS_CUDA: bool
LIST_INTERVAL: float
LIST_BLOCK: int
