"""Rewards: relaxed embeddings in for guidance, decoded text in for the final score.

| name | reward |
|---|---|
| `SequenceClassifierReward` | one label of an ``AutoModelForSequenceClassification`` |
| `LogLikelihoodReward` | the log-likelihood of the response under a causal language model |
| `CallableReward` | any function of input embeddings |
| `WeightedReward` | a weighted sum of rewards |
| `load_reward` | the first or second of these by the checkpoint |

A reward of your own is a head in an `EmbeddingReward`, whose `Reader` turns texts into embeddings; see
``examples/custom_reward.py``. Anything else that fits `Reward` and `BoundReward` works as well.
"""

from entrgi.rewards.callable import CallableReward
from entrgi.rewards.classifier import SequenceClassifierReward
from entrgi.rewards.embedding import EmbeddingReward
from entrgi.rewards.likelihood import LogLikelihoodReward
from entrgi.rewards.loading import load_reward
from entrgi.rewards.masks import attention_mask
from entrgi.rewards.options import ModelRewardOptions, RewardOptions
from entrgi.rewards.protocol import BoundReward, Head, Reward
from entrgi.rewards.reader import Reader
from entrgi.rewards.sequences import Places
from entrgi.rewards.weighted import WeightedReward

__all__ = [
    "BoundReward",
    "CallableReward",
    "EmbeddingReward",
    "Head",
    "LogLikelihoodReward",
    "ModelRewardOptions",
    "Places",
    "Reader",
    "Reward",
    "RewardOptions",
    "SequenceClassifierReward",
    "WeightedReward",
    "attention_mask",
    "load_reward",
]
