#!/usr/bin/env bash
# Trains on several machines, started by hand: run this on each of them, with another node rank, in any order.
#
#   cluster/torchrun.sh HEAD_ADDRESS NUM_NODES NODE_RANK [RANKS_PER_NODE] [OVERRIDE ...]
#
# For instance, on two machines with two GPUs each:
#
#   first machine:   cluster/torchrun.sh 192.168.1.10 2 0 2 trainer=gpu
#   second machine:  cluster/torchrun.sh 192.168.1.10 2 1 2 trainer=gpu
#
#   HEAD_ADDRESS     IPv4 address of the machine with node rank 0 (or its name), as the others reach it
#   NUM_NODES        number of machines
#   NODE_RANK        0 on the head, 1, 2, ... on the others
#   RANKS_PER_NODE   processes on each machine, the same everywhere; by default its number of GPUs, or 1
#   OVERRIDE         what danon-train takes, the same everywhere
#
# Variables:
#
#   PYTHON      interpreter that danon-lightning is installed for (python3)
#   PORT        where the machines meet on the head (29400); the firewall must let them
#   INTERFACE   network interface between the machines (the one that has this machine's address)
#   MODULE      what to run (danon_lightning.train)
#
# Only inside a trusted network: see README.md in this folder.
set -euo pipefail

if (($# < 3)); then
    echo "usage: $0 HEAD_ADDRESS NUM_NODES NODE_RANK [RANKS_PER_NODE] [OVERRIDE ...]" >&2
    exit 2
fi
head=$1 nodes=$2 node_rank=$3
shift 3
if ! [[ $nodes =~ ^[1-9][0-9]*$ && $node_rank =~ ^(0|[1-9][0-9]*)$ ]] || ((node_rank >= nodes)); then
    echo "$0: NODE_RANK must be from 0 to NUM_NODES - 1, got $node_rank of $nodes" >&2
    exit 2
fi

PYTHON=${PYTHON:-python3}
PORT=${PORT:-29400}
MODULE=${MODULE:-danon_lightning.train}

if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then
    ranks=$1
    shift
else
    ranks=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)')
fi

# The name that the others use for this machine. The head goes by what they were given; elsewhere it is the address
# from which packets to the head leave (connecting a UDP socket finds that out without sending any).
if ((node_rank == 0)); then
    is_host=true
    local_address=$head
    own_ip=$("$PYTHON" -c 'import socket, sys; print(socket.gethostbyname(sys.argv[1]))' "$head")
else
    is_host=false
    local_address=$("$PYTHON" -c '
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
    udp.connect((sys.argv[1], int(sys.argv[2])))
    print(udp.getsockname()[0])' "$head" "$PORT")
    own_ip=$local_address
fi

# gloo looks up this machine's own name unless it is told an interface; on many systems that is a loopback address,
# which nobody else can reach.
if [[ -z ${INTERFACE:-} ]] && command -v ip >/dev/null; then
    INTERFACE=$(ip -o -4 addr show to "$own_ip" | awk 'NR == 1 { print $2 }')
    # One machine may train alone over loopback, several cannot.
    if [[ $INTERFACE == lo ]] && ((nodes > 1)); then
        INTERFACE=
        echo "$0: $head is a loopback address on this machine; if ranks cannot connect, set INTERFACE" >&2
    fi
fi
if [[ -n ${INTERFACE:-} ]]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE}
fi

# torchrun would set it too, with a warning from every machine.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# This is torchrun, of the chosen interpreter. is_host is said rather than guessed: torchrun's guess compares the
# head's address with those of its host name, and fails where that is a loopback address.
exec "$PYTHON" -m torch.distributed.run \
    --nnodes="$nodes" \
    --nproc-per-node="$ranks" \
    --max-restarts=0 \
    --rdzv-id="danon-$PORT" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$head:$PORT" \
    --rdzv-conf="is_host=$is_host" \
    --local-addr="$local_address" \
    -m "$MODULE" \
    trainer.num_nodes="$nodes" \
    trainer.devices="$ranks" \
    "$@"
