"""A causal language model whose decoder layers are of several families: pre-trained ones beside new ones.

Importing this package makes the model known to transformers' Auto classes; `layerplan.models.own_types` does so when a
`config.json` names it.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from layerplan.models.hybrid.causal_lm import HybridForCausalLM, HybridModel
from layerplan.models.hybrid.config import HybridConfig

AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModel.register(HybridConfig, HybridModel, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)

__all__ = ["HybridConfig", "HybridForCausalLM", "HybridModel"]
