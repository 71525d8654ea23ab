"""What ``kd_loss`` is measured against, each as its users write it."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.bench.cases import Consuming, Run

ALPHA = 0.5  # weight of the divergence; the other half is cross-entropy
BETA = 0.5  # of the JSD

Divergence = Callable[[Tensor, Tensor], Tensor]


def _forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    return F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")


def _reverse_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    return F.kl_div(log_t, log_s, log_target=True, reduction="batchmean")


def _jsd(log_s: Tensor, log_t: Tensor) -> Tensor:
    weights = (log_s + math.log(1 - BETA), log_t + math.log(BETA))
    log_m = torch.logsumexp(torch.stack(weights), dim=0)
    return BETA * _forward_kl(log_m, log_t) + (1 - BETA) * _forward_kl(log_m, log_s)


def _tvd(log_s: Tensor, log_t: Tensor) -> Tensor:
    return 0.5 * (log_s.exp() - log_t.exp()).abs().sum(-1).mean()


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tvd": _tvd,
}


def eager(divergence: str, temperature: float) -> Run:
    """Plain PyTorch, the softmax in float32 as careful users have it."""
    distance = DIVERGENCES[divergence]

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student, teacher = student.float(), teacher.float()
        log_s = F.log_softmax(student / temperature, dim=-1)
        log_t = F.log_softmax(teacher / temperature, dim=-1)
        kd = distance(log_s, log_t) * temperature**2
        return ALPHA * kd + (1 - ALPHA) * F.cross_entropy(student, labels)

    return loss


def compiled(divergence: str, temperature: float, device: str) -> Run | str:
    """The same through ``torch.compile``, for one fixed shape."""
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
        return "torch.compile needs a C++ compiler on the CPU, none was found"
    torch._dynamo.reset()  # one shape a time: no limit on recompilations is reached
    run: Run = torch.compile(eager(divergence, temperature), dynamic=False)
    return run


def absent(package: str, device: str, needs_gpu: bool) -> str | None:
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if needs_gpu and device != "cuda":
        return f"{package} runs on a GPU only"
    return None


def liger(divergence: str, temperature: float, device: str) -> Consuming | str:
    """Liger's losses on logits: its divergence on log-probabilities and its cross-entropy.

    The cross-entropy writes its gradient over the logits.
    """
    if reason := absent("liger_kernel", device, needs_gpu=True):
        return reason
    from liger_kernel import transformers as kernels

    distance: Divergence
    if divergence == "forward_kl":
        distance = kernels.LigerKLDIVLoss(reduction="batchmean", log_target=True)
    elif divergence == "tvd":
        total = kernels.LigerTVDLoss(reduction="batchmean")

        def distance(log_s: Tensor, log_t: Tensor) -> Tensor:
            result: Tensor = total(log_s.exp(), log_t.exp())
            return result
    else:
        distance = kernels.LigerJSD(beta=1.0 if divergence == "reverse_kl" else BETA)
    cross_entropy = kernels.LigerCrossEntropyLoss()

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_s = F.log_softmax(student / temperature, dim=-1, dtype=torch.float32)
        log_t = F.log_softmax(teacher / temperature, dim=-1, dtype=torch.float32)
        kd = distance(log_s, log_t) * temperature**2
        return ALPHA * kd + (1 - ALPHA) * cross_entropy(student, labels)

    return Consuming(loss)


def trl(divergence: str, temperature: float, device: str) -> Run | str:
    """TRL's generalised JSD, which its GKD trainer uses on logits."""
    if reason := absent("trl", device, needs_gpu=False):
        return reason
    if divergence == "tvd":
        return "trl has no tvd"
    try:
        from trl.experimental.gkd import GKDTrainer
    except ImportError as error:
        return f"trl could not be imported: {str(error).splitlines()[0]}"
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETA}[divergence]

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student, teacher = student.float(), teacher.float()
        kd: Tensor = GKDTrainer.generalized_jsd_loss(
            student, teacher, beta=beta, temperature=temperature, reduction="batchmean"
        )
        kd = kd * temperature**2
        return ALPHA * kd + (1 - ALPHA) * F.cross_entropy(student, labels)

    return loss
