"""The loss of supervised fine-tuning."""

from mbridge_train.losses.base import LossInputs, LossOutputs


def sft_loss(inputs: LossInputs) -> LossOutputs:
    """Return the negative log likelihood of the targets, ``sum(weights * -logprobs)``.

    The metrics are ``loss``, ``weight`` (sum of weights), and ``entropy`` if the head returns it.
    """
    loss = -(inputs.weights * inputs.output("logprobs")).sum()
    metrics = {"loss": loss.detach().clone(), "weight": inputs.weights.sum()}
    if "entropy" in inputs.outputs:
        metrics["entropy"] = (inputs.weights * inputs.output("entropy").detach()).sum()
    return LossOutputs(loss=loss, metrics=metrics)
