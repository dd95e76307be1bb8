# Structs of csrc/ bound by name; addresses of arrays are ints, 0 where there is none. What each field means stands
# where the struct is declared: pyels.h, partial.h, and the engine.h of cpu, sampled and cuda.

class Problem:
    pixels_uint8: int
    pixels_float: int
    images: int
    channels: int
    height: int
    width: int
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
    masks: int
    want: int

class Out:
    m: int
    s: int
    y: int
    e: int
    top: int
    source: int
    ss: int
    sy: int
    yy: int
    chance: int

class Lists:
    count: int
    begin: int
    end: int
    image: int
    place: int
    mean: int
    spread: int
    directions_count: int
    origin: int
    directions: int
    step: int
    code: int
    norm: int
    rest: int

class CpuOptions:
    threads: int

class SampledOptions:
    threads: int
    tolerance: float

class CudaOptions:
    tensor_cores: bool

def reference_engine(problem: Problem, out: Out) -> None: ...
def cpu_engine(problem: Problem, options: CpuOptions, out: Out) -> None: ...
def sampled_engine(problem: Problem, options: SampledOptions, lists: Lists, out: Out) -> None: ...
def describe_lists(problem: Problem, options: CpuOptions, lists: Lists) -> None: ...
def cuda_workspace(problem: Problem, options: CudaOptions, device: int) -> int: ...
def cuda_engine(problem: Problem, options: CudaOptions, out: Out, workspace: int, device: int, stream: int) -> None: ...
def cuda_driver_lacks() -> int: ...
def available_isas() -> list[str]: ...
def isa_in_use() -> str: ...

HAS_CUDA: bool
INTERVAL: float
LIST_BLOCK: int
