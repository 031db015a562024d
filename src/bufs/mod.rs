//! Every dma-buf of the machine: who made it, who holds it, which devices are attached to it, and what only grows.
//!
//! ```no_run
//! # fn main() -> dmaflow::Result<()> {
//! let inventory = dmaflow::bufs::Inventory::take()?;
//! for buffer in &inventory.buffers {
//!     println!("{} {:?} {:?}", buffer.inode, buffer.size, buffer.exporter);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! The kernel tells it in three places. `/proc/PID/fd` and `/proc/PID/fdinfo`: descriptors, size, exporter, name.
//! `/proc/PID/maps`: mappings, which keep a buffer alive after its last descriptor has closed.
//! `/sys/kernel/debug/dma_buf/bufinfo`: the buffers that no process holds (a framebuffer keeps one, for instance), and the
//! devices attached to each. The last is root's alone; the first two are root's and, for its own processes, each user's. What
//! could not be looked at is in [`Unseen`].
//!
//! A buffer is counted once, by its inode, however many descriptors and mappings there are of it. Nothing tells of descriptors on
//! their way through a socket, nor of those of a thread that has a table of its own; [`Listed::references`] counts them.

mod growth;
mod parse;
mod scan;
mod totals;

use std::time::{Duration, SystemTime};

pub use growth::{Growth, Measure, Subject, Watch};
pub use totals::{ExporterSum, ProcessSum, Sum, Totals};

/// The dma-bufs of the machine at one moment. Processes are looked at one after the other, so what changes hands meanwhile
/// may be seen twice or not at all; the next look has it right.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Inventory {
    /// All that could be seen, by inode.
    pub buffers: Vec<Listed>,
    /// What could not be looked at.
    pub unseen: Unseen,
}

/// One dma-buf.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Listed {
    /// The kernel's number of it, which no other dma-buf has while this one lives.
    pub inode: u64,
    /// In bytes; `None` if nothing that may be read tells it.
    pub size: Option<u64>,
    /// Who made it, by the name that the kernel has for that: a part of the kernel (`videobuf2_vmalloc` for cameras that
    /// allocate so, `drm` for all displays), or a heap.
    pub exporter: Option<String>,
    /// The name that a program has given it (`DMA_BUF_SET_NAME`).
    pub name: Option<String>,
    /// All references to it that the kernel counts: one for each descriptor (those that share one after `dup` and `fork`
    /// each count), each mapping, and each import by a device.
    pub references: Option<u64>,
    /// The devices attached to it, which is what an importer does; `None` without debugfs.
    pub devices: Option<Vec<String>>,
    /// When it was exported, by the machine's clock: the change time of its inode, which nothing changes unless a program sets
    /// its mode or times. `None` if no process that may be looked at holds it.
    pub made: Option<SystemTime>,
    /// The processes that hold it, by number.
    pub holders: Vec<Holder>,
}

impl Listed {
    /// How long before `now` it was exported; `None` where that is not known, or the clock was set back since.
    pub fn age(&self, now: SystemTime) -> Option<Duration> {
        now.duration_since(self.made?).ok()
    }
}

/// A process, told from a later one of the same number by its start.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks after the machine did.
    pub start: u64,
    /// Its name, which it chose: any characters.
    pub name: String,
}

/// A process that holds a buffer, and how.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Holder {
    /// Who.
    pub process: Process,
    /// Its descriptors of the buffer.
    pub fds: Vec<i32>,
    /// Its mappings of the buffer.
    pub maps: Vec<Map>,
}

/// A mapping of a buffer, or of a part.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Map {
    /// Its first byte's place in the buffer.
    pub offset: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// As in `/proc/PID/maps`: `rw-s` is readable, writable, and shared; `p` at the end is private.
    pub access: String,
}

/// What could not be looked at, and why.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Unseen {
    /// Processes whose descriptors or mappings may not be read, with the system's answer.
    pub processes: Vec<(Process, String)>,
    /// Why debugfs tells nothing: without it no attached devices, and no buffers that only the kernel holds.
    pub debugfs: Option<String>,
    /// Why there may be processes that are not even listed.
    pub proc: Option<String>,
}

impl Unseen {
    /// Whether everything was seen.
    pub fn is_nothing(&self) -> bool {
        self.processes.is_empty() && self.debugfs.is_none() && self.proc.is_none()
    }
}
