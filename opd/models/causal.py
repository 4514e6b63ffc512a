"""A causal language model, seen as two parts: a decoder (ids to hidden states) and a head (to logits).

The objective needs hidden states at chosen rows and the head's weight, never the logits of a whole
sequence. Loading from a hub, a folder or a GGUF file is in `opd.models.loading`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from opd.errors import ModelError
from opd.maths.head import Head, Projection, Projector
from opd.models.description import is_dropout, looks_ahead
from opd.models.multimodal import decoder_of


class CausalModel(nn.Module):
    """Wraps a transformers (or peft) causal model; parameters and modules stay those of `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        layers = (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing)
        self._checkpointed = list(layers)
        self._dropping = [(name, m) for name, m in model.named_modules() if _drops(m, self.config.model_type)]
        self.gather_head: Callable[[], None] = _gather_nothing
        """Makes `head_parameters` whole while this micro-batch needs them; set where weights are sharded."""
        self.release: Callable[[], None] = _gather_nothing
        """Frees what was gathered of sharded weights; set where weights are sharded."""
        linear: Any = self._transformer.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"the head of {type(self._transformer).__name__} is a {type(linear).__name__}, but must be a plain "
                "linear layer (no adapter on it: leave it out of model.lora.targets)"
            )
        # In a tuple, which torch does not look into: asking the linear layer for a sharded weight gathers it for good.
        weight: Any = linear.weight  # a parameter; torch's own annotation says only that it is a tensor
        self._head: tuple[nn.Parameter, nn.Parameter | None] = (weight, linear.bias)
        self.vocabulary = int(weight.shape[0])
        """The number of rows of the head; those beyond the tokenizer's ids are padding."""
        self._check_head()

    @property
    def _transformer(self) -> Any:
        """The transformers model, without the peft wrapper; adapters live inside its layers."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def config(self) -> Any:
        """The settings of the language model: of a composite model, those of its part for text."""
        return self.whole_config.get_text_config(decoder=True)

    @property
    def whole_config(self) -> Any:
        """The settings of the model as its checkpoint has them."""
        return self._transformer.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(self, input_ids: Tensor, rows: Tensor) -> Tensor:
        """Compute hidden states at `rows` of the flattened batch: [B, T] ids, [N] rows -> [N, H].

        Sequences are padded on the right, so a causal model needs no mask: no real token sees a pad.
        """
        # Layers recompute their activations in training mode alone, and that would switch dropout on as well:
        # only the layers themselves are told, until the engine's next `eval()`, since the backward pass looks too.
        for layer in self._checkpointed:
            layer.training = torch.is_grad_enabled()
        self._check_nothing_drops()
        return self.hidden(input_ids).flatten(0, 1)[rows]

    def _check_nothing_drops(self) -> None:
        """Raise ModelError where a part of the model would leave something out at random: other losses, in silence."""
        for name, module in self._dropping:
            if module.training:
                raise ModelError(
                    f"{name} of {type(self._transformer).__name__} would drop out at random while training: its "
                    "dropout is not off, and with gradient checkpointing it would come on. Set it to 0 in the "
                    "model's config, or train without model.gradient_checkpointing"
                )

    def hidden(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        mask: Tensor | dict[str, Tensor] | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Compute the last hidden states, normalised as the head expects them: [B, T] -> [B, T, H].

        `mask` is one for all layers, or one for each kind of layer by transformers' name of it.
        """
        output = decoder_of(self._transformer)(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state  # type: ignore[no-any-return]

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters that `head` reads: a weight and perhaps a bias."""
        return [parameter for parameter in self._head if parameter is not None]

    def head(self) -> Head:
        """The map from hidden states to logits.

        With sharded weights, call it after the decoder's pass and in the same work.
        """
        self.gather_head()
        weight, bias = self._head
        scale = getattr(self.config, "logit_scale", None) or 1.0
        scale /= getattr(self.config, "logits_scaling", None) or 1.0
        return Head(weight, bias=bias, softcap=getattr(self.config, "final_logit_softcapping", None), scale=scale)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits: [..., H] -> [..., V], in the head's type, or in float32 where the losses multiply in float32.

        At a logit of 20 bfloat16 is 0.06 nats off, and a sampler's log-probs would be off by as much.
        """
        head = self.head()
        if not (hidden.is_cuda and head.weight.itemsize == 2) or torch.is_grad_enabled():
            return _plain_logits(hidden, head)
        flat = hidden.flatten(0, -2)
        logits = Projector(Projection.of(flat, head, 1.0, max(1, len(flat)))).logits(flat)
        return logits.view(*hidden.shape[:-1], head.vocabulary)

    @torch.no_grad()
    def _check_head(self) -> None:
        """Check that our head gives the model's own logits, and that no token looks at those behind it; else every loss
        would be wrong in silence."""
        was_training = self.model.training
        self.model.eval()
        ids = torch.arange(4, device=self.device)[None]
        ours = _log_probs(self.hidden(ids), self.head())
        theirs = self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        behind = _log_probs(self.hidden(ids + torch.eye(4, dtype=ids.dtype, device=ids.device)[-1]), self.head())
        self.model.train(was_training)
        tolerance = 1e-3 if next(self.model.parameters()).dtype in (torch.float32, torch.float64) else 0.1
        if (behind - ours)[:, :-1].abs().max().item() > tolerance:
            raise ModelError(looks_ahead(type(self._transformer).__name__))
        if (gap := (ours - theirs).abs().max().item()) > tolerance:
            raise ModelError(
                f"{type(self._transformer).__name__} computes its logits in a way that is not known here: "
                f"hidden states times the output embedding differ from them by {gap:.3g} nats"
            )


def _log_probs(hidden: Tensor, head: Head) -> Tensor:
    """Compute log-probs from logits that are rounded where the model rounds."""
    return _plain_logits(hidden, head).float().log_softmax(-1)


def _plain_logits(hidden: Tensor, head: Head) -> Tensor:
    """Compute logits as a model does itself, in the head's type."""
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _drops(module: nn.Module, model_type: str) -> bool:
    """True if a module leaves something out at random once it is in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return any(is_dropout(name, value, model_type) for name, value in vars(module).items())


def _gather_nothing() -> None:
    """Gather nothing: the model is held whole."""
