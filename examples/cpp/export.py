"""Compiles a model that calls kl_ext with AOTInductor, for run_aoti.cpp, and prints what it returns: export.py MODEL."""

import sys

import torch
from torch import Tensor

import kl_ext


class EncoderLoss(torch.nn.Module):
    """The KL term of a variational autoencoder, in nats per example."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Linear(6, 2 * 3)

    def forward(self, x: Tensor) -> Tensor:  # [B, 6]
        mu, log_var = self.encoder(x).chunk(2, dim=1)
        return kl_ext.gaussian_kl_div(mu, log_var, reduction="batchmean")


def main() -> None:
    model = EncoderLoss().eval()
    x = torch.linspace(-1, 1, 24).view(4, 6)  # the input of run_aoti.cpp
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
        print(f"{model(x).item():.9g}")


if __name__ == "__main__":
    main()
