# Starts QEMU with the guest. Sourced after common.sh and guest.sh.
# shellcheck shell=bash disable=SC2154,SC2034,SC2054 # the variables are common.sh's and run's; QEMU's options have commas

# Settings of one boot, with their defaults; the command line changes them.
kernel=6.12
icount=
gdb=
timeout=1800
qemu_pid=
run_dir=

check_kernel() {
	[ -e "$guest_dir/kernels/$kernel/vmlinuz" ] ||
		die 2 "no kernel $kernel in the guest; it has: $(cd "$guest_dir/kernels" && echo *)"
}

# A folder for this run alone. One that a killed run left behind is removed.
make_run_dir() {
	local old pid
	mkdir -p "$state/out" || die "cannot write in $state"
	for old in "$state"/run.*; do
		pid=${old##*.}
		[ ! -e "$old" ] || kill -0 "$pid" 2>/dev/null || rm -rf "$old"
	done
	run_dir=$state/run.$$
	mkdir "$run_dir"
	console=$state/console.$$.log
	: >"$console"
	ln -sfn "console.$$.log" "$state/console.log"
	# Keep the logs of the last eight runs.
	# shellcheck disable=SC2012 # the names are ours
	# Another run may clear up at the same time, so that a log is gone before `ls` looks at it.
	{ ls -t "$state"/console.[0-9]*.log 2>/dev/null || true; } | tail -n +9 | xargs -r rm -f
}

# make_initrd MODE COMMAND…: the cached initramfs, and after it an archive with the request.
make_initrd() {
	local mode=$1 request=$run_dir/initramfs/request name
	shift
	mkdir -p "$request"
	cp "$vm_dir/guest/init" "$run_dir/initramfs/init"
	cp "$vm_dir/guest/main" "$request/main"
	printf '%s\0' "$@" >"$request/argv"
	{
		printf '%s\0' HOME=/root "TERM=${TERM:-dumb}" LANG=C.UTF-8 USER=root DMAFLOW_VM=1 "DMAFLOW_VM_KERNEL=$kernel"
		while read -r name; do
			case $name in
				DMAFLOW_VM | DMAFLOW_VM_KERNEL) ;;
				DMAFLOW_* | REQUIRE | RUST_BACKTRACE | RUST_LOG | PROPTEST_*) printf '%s\0' "$name=${!name}" ;;
			esac
		done < <(compgen -e)
	} >"$request/env"
	printf '%s=%q\n' repo "$repo" mode "$mode" bin "${dmaflow_bin:-none}" \
		rows "${terminal_rows:-24}" columns "${terminal_columns:-80}" >"$request/settings"
	(cd "$run_dir/initramfs" && find . | cpio -o -H newc --quiet) >"$run_dir/request.cpio"
	cat "$guest_dir/kernels/$kernel/initrd" "$run_dir/request.cpio" >"$run_dir/initrd"
}

# Fills the array qemu. The arguments are the console's device in the guest and further QEMU options.
make_qemu_command() {
	# Both processors on one host thread. With a thread each (thread=multi), QEMU 7.2 runs a breakpoint that the kernel
	# has already taken back while it patches itself, and kernel 7.2 dies of it ("Oops: int3") in one boot of ten; and
	# it is not faster.
	local console_tty=$1 level=7 cpus=2
	# One processor for 6.12: on two, its vkms can deadlock when a CRTC is turned off. vkms_disable_vblank waits for the
	# timer (hrtimer_cancel) with a lock held that the timer's function, on the other processor, waits for
	# (drm_handle_vblank). Later kernels do not wait there ("Calling hrtimer_cancel() could result in a deadlock",
	# drm_vblank.c). Under emulation a second processor is no faster, both being one thread of the host.
	[ "$kernel" != 6.12 ] || cpus=1
	local accel=(-accel tcg,thread=single,tb-size=512 -smp "$cpus")
	# After CMPXCHG16B QEMU 7.2 leaves other numbers in the flags, with traps and the direction among them: an interrupt at the next
	# instruction, and a kernel that returns from it, panics. Linux, which allocates memory with it, has another way for processors that
	# lack it.
	local cpu=max,cx16=off
	shift
	if [ -n "$icount" ]; then
		# Fewer lines on the serial console: what the kernel prints is time of the guest, too.
		level=5
		accel=(-accel tcg,thread=single -icount shift=0,sleep=off -smp 1 -rtc clock=vm)
	elif [ "${kvm:-}" = yes ]; then
		accel=(-accel kvm -smp "$cpus")
		cpu=max
	fi
	# tsc: so that reading the clock stays in the vDSO and is no system call. The rest: no watchdog that takes a slow
	# host for a hung guest, no mitigations and no security modules that cost time under emulation, no cursor that blinks
	# on the display.
	local append="console=$console_tty loglevel=$level panic=-1 tsc=reliable clocksource=tsc nowatchdog no_timer_check"
	append+=" mitigations=off audit=0 apparmor=0 selinux=0 cryptomgr.notests random.trust_cpu=on 8250.nr_uarts=2"
	append+=" vt.global_cursor_default=0 ${gdb:+nokaslr} ${DMAFLOW_VM_APPEND:-}"
	qemu=(qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot
		-machine q35 "${accel[@]}" -cpu "$cpu" -m 2048
		-kernel "$guest_dir/kernels/$kernel/vmlinuz" -initrd "$run_dir/initrd" -append "$append"
		-drive "file=$guest_dir/root.img,if=none,id=root,format=raw,snapshot=on,cache=unsafe"
		-device virtio-blk-pci,drive=root
		-fsdev "local,id=repo,path=$repo,security_model=none,multidevs=remap"
		-device virtio-9p-pci,fsdev=repo,mount_tag=repo
		"$@")
	if [ -n "$gdb" ]; then
		qemu+=(-gdb tcp:127.0.0.1:1234 -S)
		say "waits for a debugger: gdb -ex 'target remote 127.0.0.1:1234'"
	fi
}

last_kernel_lines() {
	say "last lines of the kernel's log ($state/console.log):"
	tail -n "${1:-15}" "$console" | tr -d '\r' | sed 's/^/vm:   /' >&2
}
