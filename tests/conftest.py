"""What holds for every test: no network, and one math thread a process, as `make test` runs two processes."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, so before any test module
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
