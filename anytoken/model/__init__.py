"""The decoder-only mixture-of-experts language model; importing it registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from anytoken.model.configuration import AnyTokenConfig
from anytoken.model.modeling import AnyTokenForCausalLM, AnyTokenModel
from anytoken.utils.errors import DataError

AutoConfig.register("anytoken", AnyTokenConfig, exist_ok=True)
AutoModel.register(AnyTokenConfig, AnyTokenModel, exist_ok=True)
AutoModelForCausalLM.register(AnyTokenConfig, AnyTokenForCausalLM, exist_ok=True)

__all__ = ["AnyTokenConfig", "AnyTokenForCausalLM", "AnyTokenModel", "DataError"]
