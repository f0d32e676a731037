openmp: bool
cuda: bool

def isa_available() -> list[str]: ...
def isa_chosen() -> str: ...
def isa_choose(name: str) -> None: ...
def prepare_if_fresh(data: int, bytes: int) -> bool: ...

class Place:
    @staticmethod
    def cpu(threads: int) -> Place: ...
    @staticmethod
    def cuda(device: int, stream: int) -> Place: ...  # RuntimeError where `cuda` is false

class Rows:
    def __init__(
        self,
        data: int,
        dtype: int,
        outer: int,
        inner: int,
        vocabulary: int,
        stride_outer: int,
        stride_inner: int,
    ) -> None: ...

class Output:
    def __init__(self, data: int, stride_outer: int, stride_inner: int) -> None: ...

class Tokens:
    def __init__(self, ids: int, mask: int, shift: bool) -> None: ...

class Scaling:
    def __init__(self, temperature: float, softcap: float) -> None: ...

class Statistics:
    def __init__(self, logp: int, entropy: int, score_sqnorm: int, lse: int) -> None: ...

class TokenGradients:
    def __init__(
        self, logp: int, entropy: int, lse: int, grad_logp: int, grad_entropy: int, target_logits: int
    ) -> None: ...

def token_stats_forward(rows: Rows, tokens: Tokens, scaling: Scaling, statistics: Statistics, place: Place) -> None: ...
def token_states(rows: Rows, tokens: Tokens, scaling: Scaling, states: int, place: Place) -> None: ...
def token_stats_backward(
    out: Output, rows: Rows, tokens: Tokens, scaling: Scaling, gradients: TokenGradients, place: Place
) -> None: ...
def score_rows(
    out: Output,
    rows: Rows,
    tokens: Tokens,
    scaling: Scaling,
    coefficients: int,
    statistics: Statistics,
    place: Place,
) -> None: ...

class Segments:
    def __init__(self, mask: int, offsets: int, order: int, sequences: int, tokens: int) -> None: ...

class Switches:
    def __init__(
        self,
        weighting: int,
        aggregation: int,
        normalize_std: bool,
        skip_first: bool,
        max_weight: float,
        ess_max_weight: float,
        num_sequences: float,
        num_tokens: float,
        max_tokens: float,
    ) -> None: ...

# Of float32 and of float64 arrays.
def segment_sum_f32(out: int, values: int, segments: Segments, threads: int) -> None: ...
def segment_spread_f32(out: int, per_sequence: int, segments: Segments, threads: int) -> None: ...
def vcpo_coefficients_f32(
    inputs: list[int],
    group_size: int,
    num_groups: int,
    outputs: list[int],
    segments: Segments,
    switches: Switches,
    threads: int,
) -> None: ...

segment_sum_f64 = segment_sum_f32
segment_spread_f64 = segment_spread_f32
vcpo_coefficients_f64 = vcpo_coefficients_f32
