# Makes the guest (root disk, kernels, initramfs) once and keeps it in the cache. Sourced after common.sh, host.sh.
# shellcheck shell=bash disable=SC2154 # the variables of common.sh

# A guest is known by what made it, so that a changed recipe makes a new one and two checkouts can share one.
guest_key() {
	(cd "$vm_dir" && cat guest/packages guest/kernels.sh guest/patches/*.patch guest/make-image.sh guest/make.sh) | sha256sum | cut -c1-12
}

guest_dir=

# Sets guest_dir, and makes the guest there if it is not there yet.
guest_ready() {
	local lock
	guest_dir=$cache/$(guest_key)
	if [ -e "$guest_dir/complete" ]; then
		touch -c "$guest_dir/complete" 2>/dev/null || true
		return
	fi
	mkdir -p "$cache" || die "cannot make the cache folder $cache (DMAFLOW_VM_CACHE names another)"
	host_for_making
	exec {lock}>"$cache/lock"
	if ! flock -n "$lock"; then
		say "another set-up is running: wait for it"
		flock "$lock"
	fi
	if [ ! -e "$guest_dir/complete" ]; then
		# It inherits the lock: this may be killed, and then the lock holds until the set-up has ended as well.
		setpriv --pdeathsig TERM "$vm_dir/guest/make.sh" "$cache" "$guest_dir" ||
			die "the guest could not be made; nothing was left behind, run again to retry"
	fi
	exec {lock}>&-
}
