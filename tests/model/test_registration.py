"""transformers' Auto classes know our model type, whatever is imported first."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = "from transformers import AutoConfig; config = AutoConfig.for_model('anytoken')"
MODEL = "from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_config(config)"
LIGHT = (
    "import sys; assert [name for name in sys.modules if name.startswith('anytoken.')] == ['anytoken.moved']"
)
ORDERS = {
    "config after us": ["import anytoken", CONFIG],
    "model before us": ["from transformers import AutoModel", "import anytoken", LIGHT, CONFIG, MODEL],
    "model after us": ["import anytoken", "from transformers import AutoModelForCausalLM", LIGHT, CONFIG, MODEL],
    "config before us": ["from transformers import AutoConfig", "import anytoken", LIGHT, CONFIG, MODEL],
    "our model first": ["import anytoken.model", CONFIG, MODEL],
    "our config first": ["import anytoken.model.configuration", CONFIG, MODEL],
    "modeling_utils first": ["import anytoken", "import transformers.modeling_utils", CONFIG, MODEL],
    "their model first": ["import anytoken", "from transformers import Qwen3MoeForCausalLM", LIGHT, CONFIG, MODEL],
    "a tokenizer first": ["import anytoken", "from transformers import AutoTokenizer", CONFIG, MODEL],
}  # fmt: skip
QUICK = ("their model first",)


@pytest.mark.parametrize(
    "order", [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in ORDERS]
)
def test_auto_classes_know_the_model_in_every_order(order: str) -> None:
    code = "; ".join(ORDERS[order])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
