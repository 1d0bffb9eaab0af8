"""A reward of your own on the embedded pair: texts that are neither praise nor blame.

    python examples/custom_reward.py

A reward is a reader, which turns texts into embeddings, and a head, which turns embeddings into rewards. Only the head
is new here: it runs the embedded sentiment classifier and rewards scores near a value that is asked for.
"""

import torch
from torch import Tensor

import entrgi
import entrgi.demo
from entrgi.rewards import EmbeddingReward, Places, Reader


class Near:
    """Minus the distance of a text's sentiment to ``target``."""

    def __init__(self, model: torch.nn.Module, target: float) -> None:
        self.model, self.target = model, target

    def __call__(self, inputs_embeds: Tensor, visible: Tensor, places: Places) -> Tensor:
        score = self.model(inputs_embeds=inputs_embeds, attention_mask=visible.long()).logits[:, 0]
        return -(score - self.target).abs()


def make_reward(target: float) -> EmbeddingReward:
    model, tokenizer = entrgi.demo.load_reward(torch.float32)
    reader = Reader("near", tokenizer, [model.get_input_embeddings()])
    return EmbeddingReward(reader, Near(model, target))


def main() -> None:
    denoiser, reward = entrgi.load_denoiser("demo"), make_reward(target=0.0)
    for guidance in ("none", "entrgi"):
        output = entrgi.generate(
            ["The movie was", "I think the actors"],
            denoiser,
            reward,
            guidance=guidance,
            num_return_sequences=4,
            max_new_tokens=8,
            steps=8,
            seed=0,
        )
        name = "unguided" if guidance == "none" else "guided"
        print(f"{name}: distance to the target {-output.rewards.mean():.2f}")
        for texts, rewards in zip(output.texts, output.rewards.tolist(), strict=True):
            for text, value in zip(texts, rewards, strict=True):
                print(f"  {value:6.2f}  {text}")


if __name__ == "__main__":
    main()
