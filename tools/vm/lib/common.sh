# Names and messages that run and shell share. Sourced; the caller has set -euo pipefail.
# shellcheck shell=bash disable=SC2034

vm_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
repo=$(cd "$vm_dir/../.." && pwd -P)
cache=${DMAFLOW_VM_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/dmaflow-vm}
state=$repo/target/vm

# stdout belongs to the command in the guest: everything that the tool has to say goes to stderr.
say() { printf 'vm: %s\n' "$*" >&2; }
die() {
	local status=125
	if [[ ${1-} =~ ^[0-9]+$ ]]; then status=$1; shift; fi
	printf 'vm: error: %s\n' "$*" >&2
	exit "$status"
}
have() { command -v "$1" >/dev/null 2>&1; }
