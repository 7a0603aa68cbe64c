"""Read before any test: Triton looks at TRITON_INTERPRET when it is first imported, and many libraries import it."""

import os

import torch

if (os.environ.get("PALIMPSEST_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
