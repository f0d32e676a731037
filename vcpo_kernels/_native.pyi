openmp: bool
cuda: bool

def isa_available() -> list[str]: ...
def isa_chosen() -> str: ...
def isa_choose(name: str) -> None: ...

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

class Tokens:
    def __init__(self, ids: int, mask: int, shift: bool) -> None: ...

class Output:
    def __init__(self, data: int, stride_outer: int, stride_inner: int) -> None: ...

def token_stats_forward(
    rows: Rows,
    tokens: Tokens,
    temperature: float,
    softcap: float,
    logp: int,
    entropy: int,
    score_sqnorm: int,
    lse: int,
    threads: int,
) -> None: ...
def token_stats_backward(
    out: Output,
    rows: Rows,
    tokens: Tokens,
    temperature: float,
    softcap: float,
    logp: int,
    entropy: int,
    lse: int,
    grad_logp: int,
    grad_entropy: int,
    target_logits: int,
    threads: int,
) -> None: ...
def score_rows(
    out: Output,
    rows: Rows,
    tokens: Tokens,
    temperature: float,
    softcap: float,
    coefficients: int,
    logp: int,
    entropy: int,
    score_sqnorm: int,
    lse: int,
    threads: int,
) -> None: ...
def prepare_if_fresh(data: int, bytes: int) -> bool: ...

# Only where `cuda` is true.
def cuda_token_stats_forward(
    rows: Rows,
    tokens: Tokens,
    temperature: float,
    softcap: float,
    logp: int,
    entropy: int,
    score_sqnorm: int,
    lse: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_token_stats_backward(
    out: Output,
    rows: Rows,
    tokens: Tokens,
    temperature: float,
    softcap: float,
    logp: int,
    entropy: int,
    lse: int,
    grad_logp: int,
    grad_entropy: int,
    target_logits: int,
    device: int,
    stream: int,
) -> None: ...
def cuda_score_rows(
    out: Output,
    rows: Rows,
    tokens: Tokens,
    temperature: float,
    softcap: float,
    coefficients: int,
    logp: int,
    entropy: int,
    score_sqnorm: int,
    lse: int,
    device: int,
    stream: int,
) -> None: ...
