# Whether KVM works here. Sourced after boot.sh.
# shellcheck shell=bash disable=SC2154,SC2034,SC2054 # the variables are common.sh's and run's; QEMU's options have commas

kvm=no

# The device may be there and not work (QEMU aborts, or the guest stops in an emulation failure), so only a boot that
# came to its end counts. The answer holds until the host boots again.
find_kvm() {
	local note boot
	[ -r /dev/kvm ] && [ -w /dev/kvm ] && grep -qwE 'vmx|svm' /proc/cpuinfo || return 0
	boot=$(</proc/sys/kernel/random/boot_id)
	note=$cache/kvm.${boot:0:8}.$(id -u)
	if [ ! -e "$note" ]; then
		say "try whether KVM works here, once"
		rm -f "$cache"/kvm.*
		if DMAFLOW_VM_NO_BUILD=1 DMAFLOW_VM_KVM=yes "$vm_dir/run" --timeout 30 -- true </dev/null >/dev/null 2>&1; then
			echo yes >"$note"
		else
			echo no >"$note"
		fi
	fi
	kvm=$(<"$note")
}
