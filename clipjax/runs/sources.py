"""Where the rules of findings, and of a suggested threshold, come from: the title of each source and its address."""

from typing import NamedTuple


class Source(NamedTuple):
  """What is said of a source: `str()` is the field of a `Finding`."""

  title: str
  address: str

  def __str__(self) -> str:
    return f"{self.title}, {self.address}"


PLAYBOOK = Source("Google's tuning playbook", "https://github.com/google-research/tuning_playbook")
OLMO_2 = Source("OLMo 2, section 3", "https://arxiv.org/abs/2501.00656")
PASCANU = Source("Pascanu et al. 2013", "https://arxiv.org/abs/1211.5063")
CS231N_RATIO = Source("CS231n, ratio of updates to weights", "https://cs231n.github.io/neural-networks-3/#ratio")
CS231N_RELU = Source("CS231n, dead units", "https://cs231n.github.io/neural-networks-1/#actfun")
PRECHELT = Source("Prechelt, Early stopping, but when?, 1998", "https://doi.org/10.1007/3-540-49430-8_3")
HAMPEL = Source("Hampel 1974, the median deviation", "https://doi.org/10.1080/01621459.1974.10482962")
MIXED_PRECISION = Source("Micikevicius et al. 2018, loss scaling", "https://arxiv.org/abs/1710.03740")

_ALL = (PLAYBOOK, OLMO_2, PASCANU, CS231N_RATIO, CS231N_RELU, PRECHELT, HAMPEL, MIXED_PRECISION)
BY_TEXT = {str(source): source for source in _ALL}
