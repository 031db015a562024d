# Builds dmaflow on the host. Sourced after common.sh and host.sh.
# shellcheck shell=bash disable=SC2154,SC2034,SC2054 # the variables are common.sh's and run's; QEMU's options have commas

dmaflow_bin=

build_dmaflow() {
	local log need glibc
	dmaflow_bin=${CARGO_TARGET_DIR:-target}/release/dmaflow
	if [ -z "${DMAFLOW_VM_NO_BUILD:-}" ] && [ -e "$repo/Cargo.toml" ] && [ -e "$repo/tools/dmaflow/main.rs" ]; then
		host_for_building
		log=$state/build.$$.log
		# Quiet unless it fails; and nothing of it on stdout.
		if ! (cd "$repo" && cargo build --release --locked --bin dmaflow) >"$log" 2>&1 </dev/null; then
			cat "$log" >&2
			rm -f "$log"
			die "dmaflow does not build (DMAFLOW_VM_NO_BUILD=1 runs the guest without building)"
		fi
		rm -f "$log"
	fi
	[ -e "$repo/$dmaflow_bin" ] || return 0
	# A program built here asks for the C library's symbols of this host, which may be newer than the guest's.
	need=$(grep -aoE 'GLIBC_2\.[0-9]+' "$repo/$dmaflow_bin" | sort -uV | tail -n1 | cut -d_ -f2)
	glibc=$(<"$guest_dir/glibc")
	if [ "$(printf '%s\n' "${need:-2.0}" "$glibc" | sort -V | tail -n1)" != "$glibc" ]; then
		die "dmaflow, built on this host, needs glibc $need, and the guest has $glibc: build it on an older system, or for x86_64-unknown-linux-musl, and set DMAFLOW_VM_NO_BUILD=1"
	fi
}
