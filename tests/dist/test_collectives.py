"""Which errors of a collective are told as the loss of other processes, by what torch, gloo and NCCL say."""

import pytest
import torch
import torch.distributed as dist

from epigram.dist import collectives
from epigram.errors import LostPeerError

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] "
NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, "
UNIQUE_ID = (
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', "
    "but store->get('0') got error: "
)

LOST = [
    RuntimeError(f"{GLOO}Connection closed by peer [127.0.0.1]:10895"),
    RuntimeError(f"{GLOO}Read error [127.0.0.1]:11469: Connection reset by peer. This is typically caused by a remote"),
    RuntimeError(f"{GLOO}writev [::1]:54172: Broken pipe"),
    RuntimeError(f"{GLOO}Socket closed [127.0.0.1]:11469"),
    RuntimeError(f"{GLOO}Application timeout caused pair closure"),
    RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 600000ms for send operation to complete"),
    dist.DistBackendError(
        f"{NCCL}remote process exited or there was a network error, NCCL version 2.26.2\nncclRemoteError: A call failed "
        "possibly due to a network error or a remote process exiting prematurely.\nLast error:\n"
    ),
    dist.DistBackendError(
        f"{NCCL}internal error, NCCL version 2.14.3\nncclInternalError: Internal check failed.\nLast error:\n"
        "Net : Connection closed by remote peer host<50260>"
    ),
    dist.DistBackendError(
        "NCCL communicator was aborted on rank 1.  Original reason for failure was: Watchdog caught collective operation "
        "timeout: WorkNCCL(SeqNum=19, OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600012 milliseconds before timing out."
    ),
    dist.DistBackendError(f"{UNIQUE_ID}Socket Timeout"),
    dist.DistBackendError(f"{UNIQUE_ID}failed to recv, got 0 bytes"),
    dist.DistBackendError(f"{UNIQUE_ID}wait timeout after 600000ms, keys: /default_pg/0//cuda//0"),
    dist.DistNetworkError("No route to host"),
]

OWN = [
    RuntimeError("Invalid scalar type"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB"),
    RuntimeError("CUDA error: the launch timed out and was terminated"),
    dist.DistBackendError(
        f"{NCCL}invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5\nncclInvalidUsage: This usually "
        "reflects invalid usage of NCCL library.\nLast error:\n"
        "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"
    ),
    dist.DistBackendError(
        f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.20.5\n"
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    dist.DistBackendError(
        f"{NCCL}unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System "
        "call (e.g. socket, malloc) or external library call failed or device error. \nLast error:\n"
        "Error while creating shared memory segment /dev/shm/nccl-Xy12Ab (size 33030528), error: No space left on device (28)"
    ),
    dist.DistBackendError(
        f"{NCCL}invalid argument (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5\n"
        "ncclInvalidArgument: Invalid value for an argument.\nLast error:\nInvalid config blocking attribute value 3"
    ),
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
