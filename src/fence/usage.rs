//! Who waited for the fences of frames: the device, or this process.

use std::fmt;

use crate::error::{Error, Kind};

/// How a sink waited for the acquire fences of its frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FenceUse {
    /// Fences handed to the device, which waits for them (`IN_FENCE_FD`).
    pub by_device: u64,
    /// Fences that this process waited for before it handed the frame on.
    pub by_cpu: u64,
    /// Why the last of those was not handed to the device.
    pub why: Option<CpuWait>,
    /// Fences whose work has failed. Their frames were dropped, or, where the device waited, shown all the same.
    pub failed: u64,
    /// Frames that were dropped because a fence, theirs or in fifo that of the frame before, took too long.
    pub late: u64,
    /// Frames that went well, as far as is known: they had no fence, or it has signalled and its work has not failed.
    pub good: u64,
}

/// Why a fence was not handed to the device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CpuWait {
    /// The first picture of a display is shown by a commit that cannot be taken back and that waits.
    First,
    /// In a mailbox a frame that waits must not be in the way of newer ones.
    Mailbox,
    /// The picture was read by the CPU, to verify what is shown.
    Verified,
    /// Each commit waits, since the display may read a frame late and there are too few buffers to hold one more.
    Buffers,
    /// It was asked for.
    Asked,
    /// The driver is known to fail with them.
    Driver,
    /// The display's plane has no place for them: Linux before 4.10.
    Missing,
    /// The display was busy with a frame before.
    Busy,
    /// The driver refused a commit with this errno, and took the same without the fence.
    Refused(i32),
}

impl FenceUse {
    /// Whether there were no fences at all.
    pub fn is_none(&self) -> bool {
        self.by_device == 0 && self.by_cpu == 0 && self.lost() == 0
    }

    /// How many failed or were late.
    pub(crate) fn lost(&self) -> u64 {
        self.failed + self.late
    }

    /// One has failed or was late, as this error says. Others are not counted.
    pub(crate) fn lose(&mut self, error: &Error) {
        if !error.is_of_fence() {
            return;
        }
        match error.kind() {
            Kind::Timeout => self.late += 1,
            _ => self.failed += 1,
        }
    }

    /// A frame was taken whose fence has signalled, or that needs none.
    pub(crate) fn went_well(&mut self) {
        self.good += 1;
    }

    /// Both together.
    pub(crate) fn and(self, other: FenceUse) -> FenceUse {
        FenceUse {
            by_device: self.by_device + other.by_device,
            by_cpu: self.by_cpu + other.by_cpu,
            why: self.why.or(other.why),
            failed: self.failed + other.failed,
            late: self.late + other.late,
            good: self.good + other.good,
        }
    }

    pub(crate) fn waited(&mut self, why: CpuWait) {
        self.by_cpu += 1;
        self.why = Some(why);
    }
}

impl fmt::Display for CpuWait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CpuWait::First => f.write_str("the first picture comes with the mode"),
            CpuWait::Mailbox => f.write_str("in a mailbox a frame that waits must not be in the way of newer ones"),
            CpuWait::Verified => f.write_str("the pictures are verified"),
            CpuWait::Buffers => {
                f.write_str("there are too few buffers to send a frame before the one before is on screen")
            }
            CpuWait::Asked => f.write_str("it was asked for"),
            CpuWait::Driver => f.write_str("the display's driver is known to fail with IN_FENCE_FD"),
            CpuWait::Missing => f.write_str("the display's plane has no IN_FENCE_FD"),
            CpuWait::Busy => f.write_str("the display was busy with the frame before"),
            CpuWait::Refused(errno) => {
                write!(f, "the display's driver refuses IN_FENCE_FD ({})", crate::error::errno_name(*errno))
            }
        }
    }
}
