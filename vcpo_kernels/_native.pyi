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
