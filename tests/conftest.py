"""Read before any test: Triton looks at TRITON_INTERPRET when it is first imported, and many libraries import it; so do
Hugging Face's at whether there is a network, for which they otherwise wait most of a minute."""

import os

import torch

if (os.environ.get("PALIMPSEST_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
