//! `raw:FILE` and `raw:-`: the pixels of every frame, one after the other.

use std::os::fd::OwnedFd;
use std::path::Path;

use super::stream::{self, Stream};
use crate::endpoint::{JoinError, Rung, Shown, Sink};
use crate::error::Result;
use crate::format::{Format, Layout};
use crate::frame::{Buffer, Frame, Room};
use crate::ledger::Ledger;

/// A [`Sink`] that writes the rows of every frame as they are, colour plane after colour plane, without padding and without anything
/// between frames: [`Layout::pixel_bytes`] for each. It takes any format.
///
/// Into a pipe go the frame's own pages, without a copy ([`Rung::Exported`]), where the memory allows that: the reader must then copy
/// them out (`read`), see [`Raw::by_copy`]. Into a file, the kernel copies.
///
/// [`present`](Sink::present) waits while a pipe is full: no frame is left out, and a camera whose frames are not taken in time counts
/// them as dropped. It ends with [`Kind::Ended`](crate::error::Kind::Ended) when nobody reads any more; a program that has
/// changed what Rust does about `SIGPIPE`, which is to ignore it, gets that signal.
#[derive(Debug)]
pub struct Raw(Stream);

impl Raw {
    /// The cause of copies into a file in the [`Ledger`].
    pub const INTO_FILE: &'static str = stream::INTO_FILE;
    /// The cause of copies into a pipe or a socket.
    pub const INTO_PIPE: &'static str = stream::INTO_PIPE;

    /// A sink that will write to the file `place`, or to stdout for `-`. It is opened, and a file made empty, when it is joined; a named
    /// pipe then waits for its reader.
    pub fn new(place: impl AsRef<Path>) -> Raw {
        Raw(Stream::new("raw", place.as_ref()))
    }

    /// Ends every wait when `stop` becomes readable. The reader still has a second to take the rest of a frame that was begun.
    #[must_use]
    pub fn stop_at(mut self, stop: OwnedFd) -> Raw {
        self.0.stop_at(stop);
        self
    }

    /// Copies into pipes as well. For readers that move pages on without copying them (`splice`): those would see what the camera puts
    /// there next.
    #[must_use]
    pub fn by_copy(mut self) -> Raw {
        self.0.by_copy();
        self
    }
}

impl Sink for Raw {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn formats(&self) -> Option<Vec<Format>> {
        None
    }

    fn join(&mut self, layout: &Layout, _: Option<f64>, buffers: &[Buffer]) -> Result<Rung, JoinError> {
        self.0.join(layout, [0, 1, 2, 3], buffers)
    }

    fn allocate(&mut self, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
        self.0.allocate(layout, room, count)
    }

    fn present(&mut self, frame: Frame) -> Result<Option<Shown>> {
        self.0.send(&[], &[], frame).map(Some)
    }

    /// Frames that who shares them took back after they had gone into the pipe and before all of them was read.
    fn dropped(&self) -> u64 {
        self.0.torn()
    }

    fn imports(&self) -> u64 {
        self.0.imports()
    }

    fn ledger(&self) -> &Ledger {
        self.0.ledger()
    }
}
