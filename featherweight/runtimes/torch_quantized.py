"""PyTorch eager with quantized Linear layers, torch's own or torchao's: the same loop and cache as the baseline."""

from __future__ import annotations

from featherweight.runtimes.torch_eager import TorchEager
from featherweight.serving import Serving


class TorchQuantized(TorchEager):
    """One class for all of featherweight.torch_pack.FORMATS; serving.json says which."""

    def load(self) -> None:
        import torch

        from featherweight import torch_pack

        torch.set_num_threads(self.threads)
        self.model = torch_pack.load(self.weights, Serving.read(self.served).engine)
