//! `pattern`: a test card that needs no device.
//!
//! SMPTE bars, a block that moves from frame to frame, and the frame's number, in any [`Format`] and in
//! dma-bufs where the system can make them, paced as a camera is: a frame at each tick, and a tick without a free
//! buffer is a dropped frame.

mod card;
mod font;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::clock::now_ns;
use crate::endpoint::{Ready, Source, SourceCounts};
use crate::error::{Context, Error, Kind, Result};
use crate::fence::SyncFile;
use crate::format::{Colour, Format, Kind as Samples, Layout, MAX_PLANES};
use crate::frame::{
    Buffer, Clock, Frame, FrameFlags, FrameMeta, MAX_SLOTS, Room, SlotCounts, Slots, SlotsArc, Timestamp, ViewPolicy,
};
use crate::ledger::Copies;
use crate::memory::{Access, Allocator, CpuAccess};

use card::{Canvas, Card, MIN_SIZE};

const NAME: &str = "pattern";

/// The fastest rate, in frames a second.
const MAX_RATE: f64 = 1000.0;

/// The slowest: a frame in a quarter of an hour.
const MIN_RATE: f64 = 0.001;

/// What a [`Pattern`] should look like.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PatternRequest {
    /// The pixel format; `None` for the first of [`Format::all`], which is `XR24`.
    pub format: Option<Format>,
    /// Width and height in pixels, at least 64x48.
    pub size: (u32, u32),
    /// Frames a second, from 0.001 to 1000.
    pub rate: f64,
    /// Number of buffers, 1 to [`MAX_SLOTS`].
    pub buffers: u32,
    /// Where the memory comes from; `None` for [`Allocator::best`].
    pub allocator: Option<Allocator>,
    /// Strides are a multiple of this many bytes in every colour plane. The default of 256 suits the pickiest displays
    /// known, AMD's, at little cost.
    pub align: u32,
    /// What YUV values mean.
    pub colour: Colour,
}

impl Default for PatternRequest {
    /// XR24 640x360 at 60 frames a second, 4 buffers.
    fn default() -> PatternRequest {
        PatternRequest {
            format: None,
            size: (640, 360),
            rate: 60.0,
            buffers: 4,
            allocator: None,
            align: 256,
            colour: Colour::default(),
        }
    }
}

/// A [`Source`] that draws a test card; see the [module](self).
///
/// It keeps time as a camera does: ticks that come while nobody calls fill the buffers that are queued, in order, and
/// those for which there is none are dropped, with a gap in the sequence. A frame is drawn when it is taken; its time
/// stamp is that of its tick.
///
/// What it draws is not in any [`Ledger`](crate::ledger::Ledger): the pattern makes these bytes, it copies none. The
/// bars are drawn once into each buffer; a frame costs the few rows that change, one system call for the timer and,
/// with dma-bufs, two for the bracket around CPU access.
#[derive(Debug)]
pub struct Pattern {
    layout: Layout,
    rate: f64,
    period_ns: u64,
    allocator: Allocator,
    align: u32,
    view_policy: ViewPolicy,
    buffers: Vec<Buffer>,
    canvases: Vec<Canvas>,
    card: Card,
    slots: SlotsOfPattern,
    /// Slots to fill, as a driver would hold them, and those that a tick has filled.
    queue: VecDeque<u32>,
    filled: VecDeque<Filled>,
    timer: TimerFd,
    /// The tick to come; `None` while stopped.
    next: Option<Tick>,
    /// What the timer is set to.
    armed_ns: u64,
    dropped: u64,
}

#[derive(Clone, Copy, Debug)]
struct Tick {
    sequence: u32,
    at_ns: u64,
}

#[derive(Clone, Copy, Debug)]
struct Filled {
    slot: u32,
    tick: Tick,
}

impl Pattern {
    /// Allocates the buffers and draws what stays the same in all frames.
    ///
    /// # Errors
    /// [`Kind::Invalid`] for a size, rate or number of buffers that is out of range; what the allocator says.
    pub fn new(request: &PatternRequest) -> Result<Pattern> {
        let layout = checked_layout(request)?;
        let allocator = request.allocator.unwrap_or_else(Allocator::best);
        let made = Buffer::allocate_all(allocator, &layout, &Room::default(), request.buffers)?;
        let Drawn { card, buffers, canvases } = Drawn::into(layout, made)?;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK);
        Ok(Pattern {
            layout,
            rate: request.rate,
            // At least 1e6 (`MAX_RATE`), and `as` saturates.
            period_ns: (1e9 / request.rate).round() as u64,
            allocator,
            align: request.align,
            view_policy: ViewPolicy::default(),
            slots: SlotsOfPattern(Slots::new(request.buffers)),
            queue: VecDeque::with_capacity(buffers.len()),
            filled: VecDeque::with_capacity(buffers.len()),
            timer: timer.context("make a timer for", || NAME)?,
            buffers,
            canvases,
            card,
            next: None,
            armed_ns: 0,
            dropped: 0,
        })
    }

    /// From now on draws into these.
    fn draw_into(&mut self, layout: Layout, buffers: Vec<Buffer>) -> Result<()> {
        let Drawn { card, buffers, canvases } = Drawn::into(layout, buffers)?;
        let count = u32::try_from(buffers.len()).unwrap_or(MAX_SLOTS);
        self.slots = SlotsOfPattern(Slots::new(count));
        (self.layout, self.card, self.buffers, self.canvases) = (layout, card, buffers, canvases);
        (self.queue, self.filled) = (VecDeque::with_capacity(count as usize), VecDeque::with_capacity(count as usize));
        Ok(())
    }

    fn queue_free(&mut self) {
        for slot in self.slots.0.take_free() {
            self.queue.push_back(slot.index());
            slot.queued();
        }
    }

    /// Views keep every buffer, and may not.
    fn held(&self) -> Error {
        let views: Vec<_> = self.slots.0.views().infos().iter().map(ToString::to_string).collect();
        Error::new(Kind::Busy, "fill a buffer of", NAME)
            .because(format!("it has none: {}; views of {}", self.slots(), views.join(", ")))
            .repair("drop views sooner, let the pattern detach them, or ask for more buffers")
    }

    fn must_stand(&self) -> Result<()> {
        match self.next {
            None => Ok(()),
            Some(_) => Err(Error::new(Kind::Busy, "change the buffers of", NAME).repair("stop it first")),
        }
    }

    /// Where the memory comes from, while it is its own.
    pub fn allocator(&self) -> Allocator {
        self.allocator
    }

    /// How many slots are at each stage.
    pub fn slots(&self) -> SlotCounts {
        self.slots.0.counts()
    }

    /// Fills a queued slot for each tick up to now, and counts those for which there is none.
    fn account(&mut self, now_ns: u64) {
        let Some(next) = &mut self.next else { return };
        if now_ns < next.at_ns {
            return;
        }
        // By division and not one by one: a process may have been stopped for a day.
        let ticks = (now_ns - next.at_ns) / self.period_ns + 1;
        let first = *next;
        // The sequence number wraps, as a camera's does.
        next.sequence = first.sequence.wrapping_add(ticks as u32);
        next.at_ns = first.at_ns + ticks * self.period_ns;
        let served = ticks.min(self.queue.len() as u64);
        self.dropped += ticks - served;
        for (i, slot) in (0u32..).zip(self.queue.drain(..served as usize)) {
            let sequence = first.sequence.wrapping_add(i);
            let at_ns = first.at_ns + u64::from(i) * self.period_ns;
            self.filled.push_back(Filled { slot, tick: Tick { sequence, at_ns } });
        }
    }

    /// The descriptor is readable from the moment that the timer is set to until the timer is set again: nothing reads
    /// it. So it is left alone while there are more frames to take.
    fn arm(&mut self) -> Result<()> {
        let Some(next) = self.next.filter(|next| self.filled.is_empty() && next.at_ns != self.armed_ns) else {
            return Ok(());
        };
        let at = Expiration::OneShot(TimeSpec::from_duration(Duration::from_nanos(next.at_ns)));
        let set = self.timer.set(at, TimerSetTimeFlags::TFD_TIMER_ABSTIME);
        set.context("set the timer of", || NAME)?;
        self.armed_ns = next.at_ns;
        Ok(())
    }

    fn take(&mut self, filled: Filled) -> Result<Frame> {
        let Filled { slot, tick } = filled;
        let lost = || Error::new(Kind::System, "find a buffer of", NAME);
        let buffer = self.buffers.get(slot as usize).ok_or_else(lost)?;
        let canvas = self.canvases.get_mut(slot as usize).ok_or_else(lost)?;
        let access = begin(buffer)?;
        self.card.draw(canvas, tick.sequence);
        access.map_or(Ok(()), CpuAccess::end)?;
        let mut bytes_used = [0; MAX_PLANES];
        // The layout ends before 4 GiB.
        bytes_used[0] = self.layout.memory_len(0) as u32;
        let timestamp = Timestamp { us: tick.at_ns / 1000, clock: Clock::Monotonic };
        let meta = FrameMeta { sequence: tick.sequence, timestamp, bytes_used, flags: FrameFlags::default() };
        let lease = Slots::dequeued(&self.slots.0, slot).ok_or_else(lost)?;
        Ok(Frame::new(buffer.clone(), meta, lease))
    }
}

impl Source for Pattern {
    fn name(&self) -> &str {
        NAME
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn rate(&self) -> Option<f64> {
        Some(self.rate)
    }

    fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    fn start(&mut self) -> Result<()> {
        if self.next.is_none() {
            self.next = Some(Tick { sequence: 0, at_ns: now_ns() + self.period_ns });
            self.recycle()?;
            self.arm()?;
        }
        Ok(())
    }

    fn try_next(&mut self, _: Ready) -> Result<Option<Frame>> {
        // In this order: a slot that comes back now cannot have been filled by a tick that is past.
        self.account(now_ns());
        self.recycle()?;
        let frame = match self.filled.pop_front() {
            Some(filled) => Some(self.take(filled).inspect_err(|_| self.queue.push_back(filled.slot))?),
            None => None,
        };
        self.arm()?;
        Ok(frame)
    }

    fn recycle(&mut self) -> Result<()> {
        if self.next.is_none() {
            return Ok(());
        }
        self.queue_free();
        // As a camera's queue does when views leave it nothing to fill.
        while self.queue.is_empty() && self.filled.is_empty() && !self.slots.0.views().is_empty() {
            match self.view_policy {
                ViewPolicy::Detach if self.slots.0.detach_oldest_view() => self.queue_free(),
                ViewPolicy::Detach | ViewPolicy::Wait => break,
                ViewPolicy::Error => return Err(self.held()),
            }
        }
        Ok(())
    }

    fn release_fences(&self) -> Vec<Arc<SyncFile>> {
        self.slots.0.release_fences().into_iter().map(|(_, fence)| fence).collect()
    }

    fn starves(&self) -> bool {
        self.slots.0.starve()
    }

    fn stop(&mut self) -> Result<()> {
        // Ticks up to now that found no buffer are frames that were dropped.
        self.account(now_ns());
        self.next = None;
        self.armed_ns = 0;
        self.queue.clear();
        self.filled.clear();
        self.slots.0.cancelled();
        self.timer.unset().context("stop the timer of", || NAME)
    }

    fn agree(&mut self, wished: &Layout) -> Result<(Layout, Room)> {
        self.must_stand()?;
        let shape = wished.format() == self.layout.format() && wished.size() == self.layout.size();
        if !shape || wished.memory_planes() != 1 {
            let error = Error::new(Kind::Unsupported, "draw a test card in", wished.to_string());
            return Err(error.because(format!("it draws {} in one memory plane", self.layout)));
        }
        self.layout = wished.with_colour(self.layout.colour());
        Ok((self.layout, Room::default()))
    }

    fn use_buffers(&mut self, buffers: Vec<Buffer>) -> Result<()> {
        self.must_stand()?;
        let odd = buffers.iter().find(|buffer| buffer.layout().planes() != self.layout.planes());
        if let Some(buffer) = odd {
            let error = Error::new(Kind::Invalid, "draw a test card in", buffer.layout().to_string());
            return Err(error.because(format!("{} was agreed on", self.layout)));
        }
        self.draw_into(self.layout, buffers)
    }

    fn use_own_buffers(&mut self) -> Result<()> {
        self.must_stand()?;
        let count = u32::try_from(self.buffers.len()).unwrap_or(MAX_SLOTS);
        let bad = |cause| Error::new(Kind::Invalid, "lay out", "a test card").because(cause);
        let layout = Layout::packed(self.layout.format(), self.layout.size(), self.align).map_err(bad)?;
        let layout = layout.with_colour(self.layout.colour());
        let buffers = Buffer::allocate_all(self.allocator, &layout, &Room::default(), count)?;
        self.draw_into(layout, buffers)
    }

    fn watchdog(&self) -> Option<Duration> {
        Some(Duration::from_nanos(self.period_ns.saturating_mul(8)).max(Duration::from_secs(2)))
    }

    fn stalled(&self) -> Error {
        let views: Vec<_> = self.slots.0.views().infos().iter().map(ToString::to_string).collect();
        let error = Error::new(Kind::Timeout, "get a frame from", NAME);
        let fences = self.slots.0.waits_for();
        if !fences.is_empty() {
            return error
                .because(format!("of its buffers, {}{fences}", self.slots()))
                .repair("a device that reads the frames does not come to an end; or ask for more buffers");
        }
        if views.is_empty() {
            return error
                .because(format!("of its buffers, {}", self.slots()))
                .repair("let go of frames sooner, or ask for more buffers");
        }
        error
            .because(format!("of its buffers, {}; views of {}", self.slots(), views.join(", ")))
            .repair("drop frames and views sooner, let the pattern detach views, or ask for more buffers")
    }

    fn copies(&self) -> Vec<Copies> {
        self.slots.0.views().copies()
    }

    fn set_view_policy(&mut self, policy: ViewPolicy) {
        self.view_policy = policy;
    }

    fn counts(&self) -> SourceCounts {
        SourceCounts { dropped: self.dropped, ..SourceCounts::default() }
    }
}

impl AsFd for Pattern {
    /// The timer: readable when a frame is due.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

/// Buffers with what stays the same in all frames drawn into them.
struct Drawn {
    card: Card,
    buffers: Vec<Buffer>,
    canvases: Vec<Canvas>,
}

impl Drawn {
    fn into(layout: Layout, buffers: Vec<Buffer>) -> Result<Drawn> {
        let card = Card::new(layout);
        let mut canvases = Vec::with_capacity(buffers.len());
        for buffer in &buffers {
            let mut mappings = buffer.map(Access::ReadWrite)?;
            let mapping = mappings
                .pop()
                .ok_or_else(|| Error::new(Kind::System, "map", "a buffer of the pattern"))?;
            let access = begin(buffer)?;
            canvases.push(card.begin(mapping));
            access.map_or(Ok(()), CpuAccess::end)?;
        }
        Ok(Drawn { card, buffers, canvases })
    }
}

/// [`Slots`] with a `Debug` that says how many are where.
struct SlotsOfPattern(SlotsArc);

impl std::fmt::Debug for SlotsOfPattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.counts().fmt(f)
    }
}

/// Opens the buffer's memory to the CPU, where it is a dma-buf.
fn begin(buffer: &Buffer) -> Result<Option<CpuAccess<'_>>> {
    buffer
        .dma_buf(0)
        .map(|dma_buf| CpuAccess::begin(dma_buf, Access::ReadWrite))
        .transpose()
}

fn checked_layout(request: &PatternRequest) -> Result<Layout> {
    let PatternRequest { size: (width, height), rate, buffers, .. } = *request;
    let format = request.format.or_else(|| Format::all().next());
    let bad = |why: String| {
        let name = format.map_or_else(String::new, |format| format!("{format} "));
        Error::new(Kind::Invalid, "make a test card of", format!("{name}{width}x{height}")).because(why)
    };
    let format = format.ok_or_else(|| bad("no format is known".to_owned()))?;
    if matches!(format.kind(), Samples::Bayer { .. }) {
        return Err(bad("it is drawn as a picture, and not as a sensor would see it".to_owned()));
    }
    if width < MIN_SIZE.0 || height < MIN_SIZE.1 {
        return Err(bad(format!("it needs at least {}x{} pixels", MIN_SIZE.0, MIN_SIZE.1)));
    }
    if !(MIN_RATE..=MAX_RATE).contains(&rate) {
        return Err(bad(format!("a rate of {rate} frames a second is not between {MIN_RATE} and {MAX_RATE}")));
    }
    if !(1..=MAX_SLOTS).contains(&buffers) {
        return Err(bad(format!("it can have 1 to {MAX_SLOTS} buffers, not {buffers}")));
    }
    let layout = Layout::packed(format, (width, height), request.align);
    Ok(layout.map_err(|cause| bad(cause.to_string()))?.with_colour(request.colour))
}
