"""Which errors of a collective are told as the loss of other processes, by what torch, gloo and NCCL say."""

import pytest
import torch
import torch.distributed as dist

from epigram.dist import collectives
from epigram.errors import LostPeerError

PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "
BUFFER = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:129] "
UNIQUE_ID = (
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', "
    "but store->get('0') got error: "
)
WATCHDOG = (
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=19, OpType=ALLREDUCE, Timeout(ms)=600000) ran for "
    "600012 milliseconds before timing out."
)


def nccl(kind: str, name: str, last: str) -> RuntimeError:
    """kind and name: NCCL's of its result, of which torch makes a message together with NCCL's last words."""
    place = "/pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77"
    return dist.DistBackendError(f"NCCL error in: {place}, {kind}, NCCL version 2.27.5\n{name}\nLast error:\n{last}")


INTERNAL = "internal error", "ncclInternalError: Internal check failed."
REMOTE = (
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
)
SYSTEM = (
    "unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. ",
)
CUDA = (
    "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "ncclUnhandledCudaError: Call to CUDA function failed.",
)
USAGE = (
    "invalid usage (run with NCCL_DEBUG=WARN for details)",
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
)

LOST = [
    RuntimeError(f"{PAIR}Connection closed by peer [127.0.0.1]:10895"),
    RuntimeError(f"{PAIR}Read error [127.0.0.1]:11469: Connection reset by peer. This is typically caused by a remote"),
    RuntimeError(f"{PAIR}writev [::1]:54172: Broken pipe"),
    RuntimeError(f"{PAIR}Socket closed [127.0.0.1]:11469"),
    RuntimeError(f"{PAIR}Application timeout caused pair closure"),
    RuntimeError(f"{BUFFER}Timed out waiting 600000ms for send operation to complete"),
    nccl(*REMOTE, ""),
    nccl(*INTERNAL, "Net : Connection closed by remote peer host<50260>"),
    nccl(*SYSTEM, "socketProgressOpt: Call to recv from 10.0.0.2<33759> failed : Connection reset by peer"),
    dist.DistBackendError(f"NCCL communicator was aborted on rank 1.  Original reason for failure was: {WATCHDOG}"),
    dist.DistBackendError(f"{UNIQUE_ID}Socket Timeout"),
    dist.DistBackendError(f"{UNIQUE_ID}failed to recv, got 0 bytes"),
    dist.DistBackendError(f"{UNIQUE_ID}wait timeout after 600000ms, keys: /default_pg/0//cuda//0"),
    dist.DistNetworkError("No route to host"),
]

OWN = [
    RuntimeError("Invalid scalar type"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: the launch timed out and was terminated"),
    nccl(*USAGE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"),
    nccl(*CUDA, "Cuda failure 2 'out of memory'"),
    nccl(*SYSTEM, "Error while creating shared memory segment /dev/shm/nccl-Xy12Ab: No space left on device (28)"),
    nccl(*INTERNAL, "Attribute busid of node nic not found"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[-40:])
def test_what_a_lost_connection_raises_is_told_as_such(error: RuntimeError):
    with pytest.raises(LostPeerError) as raised, collectives._peers():
        raise error
    assert str(error) in str(raised.value)


@pytest.mark.parametrize("error", OWN, ids=lambda error: str(error)[-40:])
def test_what_goes_wrong_here_is_not_blamed_on_others(error: RuntimeError):
    with pytest.raises(type(error)) as raised, collectives._peers():
        raise error
    assert raised.value is error
