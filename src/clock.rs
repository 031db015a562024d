//! `CLOCK_MONOTONIC`, which cameras and displays stamp their frames with.

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`. No system call: the kernel answers it from the process's own memory (vDSO).
pub(crate) fn now_ns() -> u64 {
    // It can only fail for a clock that does not exist.
    let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) else { return 0 };
    // Neither is negative: the clock counts from the machine's start.
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Microseconds of `CLOCK_MONOTONIC`, the unit of [`Timestamp`](crate::frame::Timestamp).
pub(crate) fn now_us() -> u64 {
    now_ns() / 1000
}

#[cfg(test)]
mod tests {
    #[test]
    fn it_does_not_stand_still() {
        let first = super::now_ns();
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(super::now_ns() >= first + 1_000_000);
        assert!(super::now_us() >= first / 1000);
    }
}
