"""A decoder whose every measurement is known in closed form.

Three channels and a head that reads each as the logit of a label: label 0, label 1, and a carrier that only context
tokens have. Block l adds w_l times the sum of all carriers so far to the first channel; nothing else happens. With n
context tokens and W_l = n (w_1 + .. + w_l), the lens after block l says P(l) = 1 / (1 + 2 exp(-W_l)), the two other
labels sharing the rest. Zeroing the context after block l stops the sum, so the output is the lens of block l:
p~_l = P(l), and JS(l) = JS(P(L), P(l)) as of two outcomes. The mean mask keeps the sum of the carriers, and so changes
nothing.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

CONTEXT_TOKEN, QUERY_TOKEN = 1, 0


class AnalyticConfig(PreTrainedConfig):
    model_type = "analytic"
    hidden_size = 3
    vocab_size = 3
    num_hidden_layers = 1


class SummingBlock(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, hidden_states):
        added = torch.zeros_like(hidden_states)
        added[..., 0] = self.weight * hidden_states[..., 2].cumsum(-1)
        return hidden_states + added


class ScaleNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, hidden_states):
        return hidden_states * self.weight


class AnalyticTrunk(PreTrainedModel):
    config_class = AnalyticConfig

    def __init__(self, config, weights) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(3, 3)
        self.layers = nn.ModuleList([SummingBlock(weight) for weight in weights])
        self.norm = ScaleNorm()
        with torch.no_grad():
            self.embed_tokens.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))

    def forward(self, input_ids, use_cache=False, **kwargs):
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class AnalyticForCausalLM(PreTrainedModel):
    config_class = AnalyticConfig
    base_model_prefix = "model"

    def __init__(self, weights) -> None:
        config = AnalyticConfig()
        config.num_hidden_layers = len(weights)
        super().__init__(config)
        self.model = AnalyticTrunk(config, weights)
        self.lm_head = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.eye(3))

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache=False, **kwargs):
        hidden = self.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
