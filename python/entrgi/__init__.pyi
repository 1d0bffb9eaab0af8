from .config import SamplerConfig as SamplerConfig
from .config import preset as preset
from .denoisers import CallableDenoiser as CallableDenoiser
from .denoisers import DreamDenoiser as DreamDenoiser
from .denoisers import LLaDADenoiser as LLaDADenoiser
from .denoisers import MaskedLM as MaskedLM
from .denoisers import load_denoiser as load_denoiser
from .guidance import GuidanceOutput as GuidanceOutput
from .guidance import optimize_logits as optimize_logits
from .matmul import onednn_matmul as onednn_matmul
from .outputs import History as History
from .outputs import Output as Output
from .outputs import StepState as StepState
from .rewards import CallableReward as CallableReward
from .rewards import LogLikelihoodReward as LogLikelihoodReward
from .rewards import SequenceClassifierReward as SequenceClassifierReward
from .rewards import WeightedReward as WeightedReward
from .rewards import load_reward as load_reward
from .sampler import generate as generate

__version__: str
