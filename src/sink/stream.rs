//! Frames as a stream of bytes: what the sinks `y4m:` and `raw:` share.
//!
//! Into a pipe go the pages of the frame's own memory (`vmsplice`), and the frame's lease is held until the reader has taken its bytes
//! out. The pipe is given room for one frame and for less than two, so two frames at most are held.
//!
//! A reader that takes bytes out by moving pages on (`splice`, `tee`) instead of copying them has them no earlier than it looks at them,
//! and the camera may have filled them again by then. Most programs `read`; for those that do not, there is
//! [`by_copy`](super::Raw::by_copy).

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;

use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use super::output::{How, Output};
use crate::clock::now_us;
use crate::endpoint::{ImportCache, Importer, JoinError, Refusal, Rung, Shown};
use crate::error::{Context, Error, Kind, Result};
use crate::fence::PATIENCE;
use crate::format::{Layout, MAX_PLANES, Modifier};
use crate::frame::{Buffer, Frame, Room};
use crate::ledger::Ledger;
use crate::memory::{Access, Allocator, CpuAccess, Mapping, Memory, SPANS, Span, page_size, vmsplice};

/// Copies in the kernel, into a file.
pub(super) const INTO_FILE: &str = "written to a file";
/// Copies in the kernel, into a pipe or a socket.
pub(super) const INTO_PIPE: &str = "written into a pipe";

/// Two in the pipe, one that the source fills and one more, so that it never waits for the reader.
const LEAST_BUFFERS: usize = 4;

/// A stream of frames.
#[derive(Debug)]
pub(super) struct Stream {
    output: Output,
    layout: Option<Layout>,
    /// The colour planes in the order in which they go.
    order: [usize; MAX_PLANES],
    may_splice: bool,
    how: How,
    images: ImportCache<Vec<Mapping>>,
    /// Frames in the pipe, each with the count of bytes at its end.
    held: VecDeque<(u64, Frame)>,
    /// See [`Stream::torn`].
    torn: u64,
    ledger: Ledger,
}

impl Stream {
    pub(super) fn new(kind: &str, place: &Path) -> Stream {
        Stream {
            output: Output::new(kind, place),
            layout: None,
            order: [0, 1, 2, 3],
            may_splice: true,
            how: How::Write,
            images: ImportCache::new(),
            held: VecDeque::new(),
            torn: 0,
            ledger: Ledger::new(),
        }
    }

    pub(super) fn name(&self) -> &str {
        self.output.name()
    }

    pub(super) fn stop_at(&mut self, stop: OwnedFd) {
        self.output.stop_at(stop);
    }

    pub(super) fn by_copy(&mut self) {
        self.may_splice = false;
    }

    /// Whether anything was sent.
    pub(super) fn has_begun(&self) -> bool {
        self.output.sent() > 0
    }

    pub(super) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Buffers whose pages a pipe takes. Mapping them for the CPU is no import.
    pub(super) fn imports(&self) -> u64 {
        if self.how == How::Write { 0 } else { self.images.imports() }
    }

    /// Gets ready for frames of this layout, whose planes go in this order. [`Rung::Exported`] where no byte of them is copied.
    ///
    /// # Errors
    /// A refusal: tiled memory, memory that cannot be spliced (of a dma-buf; other memory is written), another layout in the middle of
    /// the stream. Or a failure of the output.
    pub(super) fn join(
        &mut self,
        layout: &Layout,
        order: [usize; MAX_PLANES],
        buffers: &[Buffer],
    ) -> Result<Rung, JoinError> {
        let refusal =
            |rung, step, why, repair: &str| Refusal { rung, step, errno: None, why, repair: repair.to_owned() };
        if let Some(modifier) = layout.modifier().filter(|&modifier| modifier != Modifier::LINEAR) {
            let why = format!("its rows are tiled ({modifier})");
            let repair = "ask the source for linear buffers that the CPU can read";
            return Err(refusal(Rung::Exported, "modifier", why, repair).into());
        }
        let same = |before: &Layout| before.format() == layout.format() && before.size() == layout.size();
        if self.output.sent() > 0 && !self.layout.as_ref().is_none_or(same) {
            let why = format!("{} cannot become {layout} in the middle of a stream", self.name());
            // Whatever the rung: another one would not help.
            return Err(Error::new(Kind::Unsupported, "go on with", self.name())
                .because(why)
                .repair("start another stream")
                .into());
        }
        self.output.open()?;
        (self.layout, self.order, self.how) = (Some(*layout), order, How::Write);
        self.images.clear();
        let splice = self.may_splice && self.output.is_pipe();
        let mut no = None;
        if splice && buffers.len() < LEAST_BUFFERS {
            let why = format!("{} buffers are too few: the pipe keeps up to two from the source", buffers.len());
            no = Some(refusal(Rung::Exported, "vmsplice", why, "give the source four buffers or more"));
        } else if splice && !self.output.make_room(pages(layout)) {
            let why = "the pipe holds more than one frame, and cannot be made smaller".to_owned();
            no = Some(refusal(Rung::Exported, "F_SETPIPE_SZ", why, "let nobody else write into it before"));
        }
        let mut importer = Splicer { try_it: splice && no.is_none() };
        for buffer in buffers {
            match self.images.get(&mut importer, buffer) {
                Err(refusal) if importer.try_it && refusal.step == "vmsplice" => {
                    importer.try_it = false;
                    no = Some(refusal);
                    self.images.get(&mut importer, buffer)?;
                }
                other => drop(other?),
            }
        }
        if importer.try_it {
            self.how = How::Splice;
            self.held.reserve(LEAST_BUFFERS);
            return Ok(Rung::Exported);
        }
        match no {
            // Other memory may do.
            Some(refusal) if buffers.iter().all(Buffer::is_dma_buf) && !buffers.is_empty() => Err(refusal.into()),
            _ => Ok(Rung::Copied),
        }
    }

    /// Memory that can be spliced, and that nobody else wants.
    ///
    /// # Errors
    /// What the system says.
    pub(super) fn allocate(&self, layout: &Layout, room: &Room, count: u32) -> Result<Vec<Buffer>> {
        Buffer::allocate_all(Allocator::Plain, layout, room, count)
    }

    /// Sends `head`, if there is one, then `mark` and the pixels of a frame. Waits while the pipe is full.
    ///
    /// # Errors
    /// [`Kind::Ended`] when nobody reads any more, or an order to stop came and the reader did not take the rest of a frame soon;
    /// [`Kind::Revoked`] if who shares the frame has taken it back: then nothing was sent; or took it back while it was written: then all of
    /// it was sent, of two pictures perhaps, and the next can follow.
    pub(super) fn send(&mut self, head: &[u8], mark: &'static [u8], frame: Frame) -> Result<Shown> {
        self.release();
        frame.check()?;
        // SAFETY: borrowed for longer than the call that uses it, which copies it, and not changed meanwhile.
        let head = unsafe { Span::new(NonNull::from(head).cast(), head.len()) };
        let sent = head.is_empty() || self.output.send(&[head], How::Write)?;
        self.ended_unless(sent)?;
        let before = self.output.sent();
        let sent = self.send_frame(mark, &frame).map_err(|error| {
            // Nothing can follow a part of a frame, not even the same frame by another way.
            let broken = self.output.sent() > before;
            if broken { error.kind_is(Kind::Invalid) } else { error }
        })?;
        self.ended_unless(sent)?;
        let shown = Shown { meta: *frame.meta(), at_us: now_us() };
        match self.how {
            How::Splice => {
                self.held.push_back((self.output.sent(), frame));
                self.release();
            }
            How::Write => {
                let cause = if self.output.takes_all() { INTO_FILE } else { INTO_PIPE };
                self.ledger.enter(cause, frame.buffer().layout().pixel_bytes());
                frame.check()?;
            }
        }
        Ok(shown)
    }

    fn send_frame(&mut self, mark: &'static [u8], frame: &Frame) -> Result<bool> {
        frame.wait_acquired(PATIENCE)?;
        let (buffer, how) = (frame.buffer(), self.how);
        let mut access = [const { None }; MAX_PLANES];
        for (memory, access) in (0u32..).zip(&mut access) {
            *access = buffer
                .dma_buf(memory)
                .map(|dma_buf| CpuAccess::begin(dma_buf, Access::Read))
                .transpose()?;
        }
        let unknown = || Error::new(Kind::Invalid, "send", "a frame").because("its buffer has another layout");
        let layout = *buffer.layout();
        let mappings = self
            .images
            .get(&mut Splicer { try_it: false }, buffer)
            .map_err(|refusal| Error::new(Kind::System, "send", "a frame").because(refusal))?;
        // SAFETY: it is there for ever and never changes, also while its page is in a pipe.
        let mark = unsafe { Span::new(NonNull::from(mark).cast(), mark.len()) };
        let (mut spans, mut count) = ([mark; SPANS], usize::from(!mark.is_empty()));
        for &plane in &self.order[..layout.format().planes()] {
            let place = layout.planes()[plane];
            let memory = mappings.get(place.memory as usize).ok_or_else(unknown)?.span();
            let (bytes, rows, at_once) = rows(&layout, plane);
            for row in 0..rows {
                if count == SPANS {
                    if !self.output.send(&spans, how)? {
                        return Ok(false);
                    }
                    count = 0;
                }
                let offset = place.offset as usize + place.stride as usize * row * at_once;
                spans[count] = memory.part(offset, bytes).ok_or_else(unknown)?;
                count += 1;
            }
        }
        self.output.send(&spans[..count], how)
    }

    /// Lets go of the frames that the reader has taken.
    fn release(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let taken = self.output.taken();
        while self.held.front().is_some_and(|&(end, _)| end <= taken) {
            let torn = self.held.pop_front().is_some_and(|(_, frame)| frame.check().is_err());
            self.torn += u64::from(torn);
        }
    }

    /// Frames that who shares them took back while their pages were in the pipe. They were told as shown before that was known.
    pub(super) fn torn(&self) -> u64 {
        self.torn
    }

    fn ended_unless(&self, sent: bool) -> Result<()> {
        let ended = || Error::new(Kind::Ended, "write", self.name()).because("nobody reads it any more");
        if sent && !self.output.is_over() { Ok(()) } else { Err(ended()) }
    }
}

/// How a plane goes: bytes of a part, how many parts, and rows in each. All at once where there is no padding between rows.
fn rows(layout: &Layout, plane: usize) -> (usize, usize, usize) {
    let bytes = layout.format().row_bytes(plane, layout.width()) as usize;
    let rows = layout.format().rows(plane, layout.height()) as usize;
    let stride = layout.planes()[plane].stride as usize;
    if stride == bytes { (bytes * rows, 1, rows) } else { (bytes, rows, 1) }
}

/// Pages of a pipe that a frame takes, with one for what goes before it. A part of a page takes a whole one.
fn pages(layout: &Layout) -> usize {
    let page = page_size();
    let of = |plane: usize| {
        let place = layout.planes()[plane];
        let (bytes, parts, at_once) = rows(layout, plane);
        let offset = |part: usize| place.offset as usize + place.stride as usize * part * at_once;
        (0..parts)
            .map(|part| (offset(part) % page + bytes).div_ceil(page))
            .sum::<usize>()
    };
    (0..layout.format().planes()).map(of).fold(1, usize::saturating_add)
}

/// Maps buffers, and tries whether a pipe takes their pages.
struct Splicer {
    try_it: bool,
}

impl Importer for Splicer {
    type Image = Vec<Mapping>;

    fn name(&self) -> &str {
        "pipe"
    }

    fn import(&mut self, buffer: &Buffer) -> Result<Vec<Mapping>, Refusal> {
        let refusal = |step, errno, why: String| Refusal {
            rung: Rung::Exported,
            step,
            errno,
            why,
            repair: "use memory of the camera's (vb2-vmalloc), or udmabuf".to_owned(),
        };
        let mapped = std::iter::zip(buffer.memory(), buffer.memory_lens()).map(|(memory, &len)| {
            // The memfd under a udmabuf is the same memory, in pages that a pipe takes.
            let memfd = match memory {
                Memory::DmaBuf(dma_buf) => dma_buf.memfd(),
                Memory::Plain(_) => None,
            };
            Mapping::new(memfd.unwrap_or(memory.as_fd()), len, Access::Read)
        });
        let mapped: Result<Vec<_>> = mapped.collect();
        let mapped = mapped.map_err(|error| refusal("mmap", error.errno(), error.line()))?;
        if self.try_it {
            let tried = mapped.iter().try_for_each(try_splice);
            tried.map_err(|error| {
                let why = format!("a pipe does not take the pages of this memory: {}", error.line());
                refusal("vmsplice", error.errno(), why)
            })?;
        }
        Ok(mapped)
    }
}

fn try_splice(mapping: &Mapping) -> Result<()> {
    let about = || "a pipe";
    let (_reader, writer) = pipe2(OFlag::O_CLOEXEC).context("make", about)?;
    let first = mapping.span().part(0, 1).unwrap_or(Span::EMPTY);
    vmsplice(writer.as_fd(), &[first]).map(drop).context("splice into", about)
}
