#!/bin/sh
# Install what slurm/lab and its tests need on Debian or Ubuntu. Does nothing where all of it is there.
set -eu

packages="slurmctld slurmd slurm-client munge iproute2 util-linux shellcheck"

missing=""
for package in $packages; do
    if ! dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null |
        grep -qx installed; then
        missing="$missing $package"
    fi
done
if [ -z "$missing" ]; then
    echo "slurm/lab/install.sh: everything is installed"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "slurm/lab/install.sh: no apt-get here; install by other means:$missing" >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "slurm/lab/install.sh: must run as root (sudo $0) to install:$missing" >&2
    exit 1
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Run level 1 keeps the packages from starting daemons of the system: a lab starts its own.
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
# shellcheck disable=SC2086 # a list of words
if ! { apt-get update && apt-get install --yes --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "slurm/lab/install.sh: could not install:$missing" >&2
    exit 1
fi
echo "slurm/lab/install.sh: installed:$missing"
