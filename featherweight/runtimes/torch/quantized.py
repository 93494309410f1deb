"""PyTorch eager with quantized Linear layers, torch's own or torchao's: the same loop and cache as the baseline."""

from __future__ import annotations

from featherweight.runtimes.torch.eager import TorchModel
from featherweight.store.served_folder import Serving


class QuantizedTorchModel(TorchModel):
    """One class for all of featherweight.runtimes.torch.pack.FORMATS; serving.json says which."""

    def load(self) -> None:
        import torch

        from featherweight.runtimes.torch import pack

        torch.set_num_threads(self.threads)
        self.model = pack.load(self.weights, Serving.read(self.served).engine, self.device)
