//! What is known of one filling of a buffer.

use crate::format::MAX_PLANES;

/// Which clock a time stamp was read from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Clock {
    /// The source did not say.
    #[default]
    Unknown,
    /// `CLOCK_MONOTONIC`.
    Monotonic,
    /// Copied from another queue (a memory-to-memory device).
    Copied,
}

/// When a frame was captured.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Timestamp {
    /// Microseconds since the clock's start.
    pub us: u64,
    /// The clock.
    pub clock: Clock,
}

/// Marks that the source put on a frame.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FrameFlags {
    /// The picture may be damaged (`V4L2_BUF_FLAG_ERROR`); the camera hands such frames out only when asked to.
    pub error: bool,
    /// The last frame of the stream (`V4L2_BUF_FLAG_LAST`).
    pub last: bool,
    /// The time stamp is of the start of the exposure, not of the end of the frame (`V4L2_BUF_FLAG_TSTAMP_SRC_SOE`).
    pub start_of_exposure: bool,
}

/// What is known of one filling of a buffer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FrameMeta {
    /// The source's number of the frame; a gap means frames that were never delivered. Wraps at 2^32.
    pub sequence: u32,
    /// When it was captured.
    pub timestamp: Timestamp,
    /// Bytes of data in each memory plane.
    pub bytes_used: [u32; MAX_PLANES],
    /// Marks of the source.
    pub flags: FrameFlags,
}
