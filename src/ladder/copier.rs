//! The rungs `converted` and `copied`: each frame becomes another in a buffer that the sink takes, made by a GPU, or read by the CPU through
//! a copy-on-write view and written once.

use std::sync::Arc;

use crate::convert::Converter;
#[cfg(feature = "vulkan")]
use crate::endpoint::JoinError;
use crate::endpoint::Verdict;
use crate::error::{Error, Kind, Result};
use crate::fence::SyncFile;
use crate::format::{Format, Layout, MAX_PLANES, Pixels};
use crate::frame::{Buffer, Frame, FrameMeta, SlotCounts, Slots, SlotsArc};
use crate::ledger::{Copies, Ledger};
use crate::memory::Span;
#[cfg(feature = "vulkan")]
use crate::vulkan::GpuConverter;

use super::converted::ByGpu;

/// Who the views of this module say that they are.
const HOLDER: &str = "dmaflow: copy for the sink";

/// Memory planes by number: as many as a layout can have.
const SPANS: [u32; MAX_PLANES] = [0, 1, 2, 3];

/// On screen, about to be, waiting, and one to write into.
pub(super) const BUFFERS: u32 = 4;

/// Who makes the copies.
enum Engine {
    Cpu(Box<Converter>),
    #[cfg(feature = "vulkan")]
    Gpu(Box<GpuConverter>),
}

impl Engine {
    fn from(&self) -> &Layout {
        match self {
            Engine::Cpu(converter) => converter.from(),
            #[cfg(feature = "vulkan")]
            Engine::Gpu(converter) => converter.from(),
        }
    }

    fn to(&self) -> &Layout {
        match self {
            Engine::Cpu(converter) => converter.to(),
            #[cfg(feature = "vulkan")]
            Engine::Gpu(converter) => converter.to(),
        }
    }
}

/// Copies frames into buffers of its own, converting them where the sink takes another format.
///
/// A frame's lease is held for the copy and no longer, so the source gets its buffer back at once. By the CPU a frame costs the few small
/// allocations of its view; by a GPU none.
pub struct Copier {
    engine: Engine,
    buffers: Vec<Buffer>,
    slots: SlotsArc,
    cause: &'static str,
    ledger: Ledger,
    dropped: u64,
    /// A GPU failed: it is not asked again.
    broken: bool,
    check: Option<Check>,
}

impl std::fmt::Debug for Copier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Copier({} to {}, {})", self.engine.from(), self.engine.to(), self.slots())
    }
}

impl Copier {
    /// Frames of another format.
    pub const CONVERTED: &'static str = "converted for a sink that lacks the format";
    /// Frames of the same format, in other memory.
    pub const MOVED: &'static str = "copied for a sink that refused the buffers";
    /// Frames that could have gone without a copy.
    pub const DEMANDED: &'static str = "copied because a copy was demanded";

    /// A copier, by the CPU, of frames laid out as `from` into these buffers, which are all laid out alike.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if there is no conversion; [`Kind::Invalid`] without a buffer.
    pub(super) fn by_cpu(from: &Layout, buffers: Vec<Buffer>, demanded: bool) -> Result<Copier> {
        let about = |kind| Error::new(kind, "copy", from.to_string());
        let first = buffers
            .first()
            .ok_or_else(|| about(Kind::Invalid).because("there is nothing to copy into"))?;
        let to = *first.layout();
        let converter = Converter::new(from, &to).map_err(|cause| about(Kind::Unsupported).because(cause))?;
        let cause = match (from.format() == to.format(), demanded) {
            (false, _) => Copier::CONVERTED,
            (true, true) => Copier::DEMANDED,
            (true, false) => Copier::MOVED,
        };
        Ok(Copier::new(Engine::Cpu(Box::new(converter)), buffers, cause))
    }

    /// One by a GPU, prepared for these buffers.
    #[cfg(feature = "vulkan")]
    pub(super) fn by_gpu(converter: GpuConverter, buffers: Vec<Buffer>) -> Copier {
        Copier::new(Engine::Gpu(Box::new(converter)), buffers, Copier::CONVERTED)
    }

    fn new(engine: Engine, buffers: Vec<Buffer>, cause: &'static str) -> Copier {
        let slots = Slots::new(u32::try_from(buffers.len()).unwrap_or(u32::MAX));
        Copier { engine, buffers, slots, cause, ledger: Ledger::new(), dropped: 0, broken: false, check: None }
    }

    /// The GPU that converts, if one does.
    pub fn gpu(&self) -> Option<ByGpu> {
        match &self.engine {
            Engine::Cpu(_) => None,
            #[cfg(feature = "vulkan")]
            Engine::Gpu(converter) => Some(ByGpu::of(converter.gpu().info())),
        }
    }

    /// Whether the GPU that converted has failed.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// The buffers that frames are copied into.
    pub(crate) fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    /// What frames become: as the buffers state it.
    pub(crate) fn layout(&self) -> &Layout {
        self.buffers.first().map_or(self.engine.to(), Buffer::layout)
    }

    /// The copies made.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Frames for which no buffer was free, because the sink held all.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Where each of its buffers is.
    pub fn slots(&self) -> SlotCounts {
        self.slots.counts()
    }

    /// From now on compares each copy with the frame that it was made from: all bytes where the formats are equal; else one row of eight,
    /// others each time, each channel with what [`Pixels::rgb`] makes of the frame, as many steps of 8 bits aside at most as [`steps`]
    /// says. A conversion that goes wrong in one frame alone, in a row that is not looked at, is not found: the display's CRC tells
    /// whether the copy is shown right, because it is predicted from the copy. What a GPU made of Bayer samples is not compared: there is
    /// more than one right picture.
    pub(crate) fn check(&mut self) {
        let (from, to) = (self.engine.from(), self.engine.to());
        if !matches!(from.format().kind(), crate::format::Kind::Bayer { .. }) {
            self.check.get_or_insert_with(|| Check::new(from, to));
        }
    }

    /// The copies that were wrong, if they were compared with their frames.
    pub fn verdict(&self) -> Option<Verdict> {
        self.check.as_ref().map(|check| check.verdict)
    }

    /// A slot to write into; where views keep all of them, the oldest is detached.
    fn take(&self) -> Option<u32> {
        let take = || {
            let slot = self.slots.take_free().next()?;
            let index = slot.index();
            slot.queued();
            Some(index)
        };
        take().or_else(|| self.slots.detach_oldest_view().then(take).flatten())
    }

    /// The fences of devices that read copies which nobody holds, if they keep every buffer that is free: until one has signalled there is
    /// none to copy into. Without release fences no system call.
    pub(crate) fn blocked_by(&self) -> Vec<Arc<SyncFile>> {
        let fences = self.slots.release_fences();
        // Looked at, a free slot stays free.
        if fences.is_empty() || self.slots.take_free().next().is_some() {
            return Vec::new();
        }
        fences.into_iter().map(|(_, fence)| fence).collect()
    }

    /// What the CPU copied for those who hold views of the copies.
    pub fn view_copies(&self) -> Vec<Copies> {
        self.slots.views().copies()
    }

    /// The frame, which has this place among all captured, in a buffer of the copier's own; `None` if none is free, which is counted.
    ///
    /// # Errors
    /// If the frame cannot be read or the buffer not written.
    pub fn copy(&mut self, frame: &Frame, place: u64) -> Result<Option<Frame>> {
        let Some(index) = self.take() else {
            self.dropped += 1;
            return Ok(None);
        };
        let lost = || Error::new(Kind::System, "find a buffer for", "a copy");
        // Taken and given back by the same hands: a failure below drops the lease, and with it the slot is free again.
        let lease = Slots::dequeued(&self.slots, index).ok_or_else(lost)?;
        let buffer = self.buffers.get(index as usize).ok_or_else(lost)?;
        let made = match &mut self.engine {
            Engine::Cpu(converter) => by_cpu(converter, frame, buffer)?,
            #[cfg(feature = "vulkan")]
            Engine::Gpu(converter) => {
                frame.wait_acquired(crate::fence::PATIENCE)?;
                // The end is waited for: work that is late or fails has the flow go one rung down, with this frame.
                converter.convert(frame.buffer(), buffer).map_err(|error| {
                    self.broken = true;
                    match error {
                        JoinError::Failed(error) => error,
                        JoinError::Refused(refusal) => {
                            Error::new(Kind::System, "convert", frame.buffer().layout().to_string()).because(refusal)
                        }
                    }
                })?;
                frame.check().ok().map(|()| 0)
            }
        };
        let Some(bytes) = made else {
            // Who shares it has taken it back meanwhile: what was made may be of two pictures.
            self.dropped += 1;
            return Ok(None);
        };
        if bytes > 0 {
            self.ledger.enter(self.cause, bytes);
        }
        let meta = FrameMeta { bytes_used: used(buffer.layout()), ..*frame.meta() };
        let copy = Frame::new(buffer.clone(), meta, lease);
        if let Some(check) = &mut self.check {
            check.compare(frame, &copy, place)?;
        }
        Ok(Some(copy))
    }
}

/// Copies or converts a frame with the CPU; the bytes written, or `None` if who shares it has taken it back meanwhile.
fn by_cpu(converter: &mut Converter, frame: &Frame, buffer: &Buffer) -> Result<Option<u64>> {
    let mut writer = buffer.write()?;
    let (bytes, checked) = if frame.buffer().maps_privately() {
        let view = frame.view(HOLDER)?;
        let bytes = converter.copy(&SPANS.map(|memory| view.memory(memory).unwrap_or(Span::EMPTY)), &mut writer);
        (bytes, view.check())
    } else {
        // A view would be a snapshot, and so a second copy. The lease that the caller holds does for as long as this takes.
        let reader = frame.read()?;
        let bytes = converter.copy(&SPANS.map(|memory| reader.memory(memory).unwrap_or(Span::EMPTY)), &mut writer);
        (bytes, frame.check())
    };
    writer.end()?;
    Ok(checked.is_ok().then_some(bytes))
}

fn used(layout: &Layout) -> [u32; MAX_PLANES] {
    let mut used = [0; MAX_PLANES];
    for (memory, used) in (0u32..).zip(&mut used) {
        // A layout ends before 4 GiB.
        *used = layout.memory_len(memory) as u32;
    }
    used
}

/// Of so many rows of a converted frame one is compared: the reference takes its time.
const ROWS: u64 = 8;

/// Compares copies with what they were made from.
struct Check {
    same: bool,
    from: [Vec<u8>; MAX_PLANES],
    to: [Vec<u8>; MAX_PLANES],
    verdict: Verdict,
}

impl Check {
    fn new(from: &Layout, to: &Layout) -> Check {
        let rows = |layout: &Layout| {
            let format = layout.format();
            let row = |plane| match plane < format.planes() {
                true => vec![0; format.row_bytes(plane, layout.width()) as usize],
                false => Vec::new(),
            };
            [0, 1, 2, 3].map(row)
        };
        Check { same: from.format() == to.format(), from: rows(from), to: rows(to), verdict: Verdict::default() }
    }

    fn compare(&mut self, frame: &Frame, copy: &Frame, place: u64) -> Result<()> {
        let (before, after) = (frame.read()?, copy.read()?);
        let (from, to) = (*before.layout(), *after.layout());
        let mut right = true;
        let (first, step) = if self.same { (0, 1) } else { ((place % ROWS) as u32, ROWS as usize) };
        for y in (first..from.height()).step_by(step) {
            fill(&mut self.from, from.format(), y, &mut |plane, row, out| before.row(plane, row, out));
            fill(&mut self.to, to.format(), y, &mut |plane, row, out| after.row(plane, row, out));
            right &= match self.same {
                true => self.from == self.to,
                false => alike(&self.from, &from, &self.to, &to),
            };
        }
        if frame.check().is_err() {
            // Taken back by who shares it since it was copied: what the copy was compared with may be another picture.
            return Ok(());
        }
        self.verdict.checked += 1;
        if !right {
            self.verdict.wrong += 1;
            self.verdict.first_wrong.get_or_insert((place, frame.meta().sequence));
        }
        Ok(())
    }
}

/// Reads the rows of every plane that picture row `y` needs.
fn fill(rows: &mut [Vec<u8>; MAX_PLANES], format: Format, y: u32, read: &mut dyn FnMut(usize, u32, &mut [u8])) {
    let (_, vertical) = format.subsampling();
    for (plane, row) in rows.iter_mut().enumerate().take(format.planes()) {
        match plane {
            0 => read(0, y, row),
            // A row of chroma serves several of luma.
            _ => read(plane, y / vertical, row),
        }
    }
}

/// Whether two rows show the same, each channel within the steps that its own format has.
fn alike(from: &[Vec<u8>; MAX_PLANES], a: &Layout, to: &[Vec<u8>; MAX_PLANES], b: &Layout) -> bool {
    let (from, to) = (from.each_ref().map(Vec::as_slice), to.each_ref().map(Vec::as_slice));
    let (before, after) = (Pixels::new(a.format(), &from), Pixels::new(b.format(), &to));
    let step = steps(b.format());
    (0..a.width()).all(|x| {
        let (p, q) = (before.rgb(x, a.colour()), after.rgb(x, b.colour()));
        p.r.abs_diff(q.r) <= step && p.g.abs_diff(q.g) <= step && p.b.abs_diff(q.b) <= step
    })
}

/// The most, in 8-bit steps, that a right pixel may differ by: one, or what the destination's fewer bits lose (8 for the 5 bits of RG16);
/// two for YUV, which is computed back to RGB to be compared.
fn steps(format: Format) -> u8 {
    match format.kind() {
        crate::format::Kind::Rgb { channels, .. } => {
            let bits = channels.iter().map(|channel| channel.width).min().unwrap_or(8).min(8);
            // Half a step of 5 bits is 4 of 8, rounded either way.
            1u8.max(1u8 << (8 - bits))
        }
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Clock, FrameFlags, Room, Timestamp};
    use crate::memory::{Access, Allocator};

    fn frame(buffer: &Buffer) -> Frame {
        let slots = Slots::new(1);
        slots.take_free().for_each(crate::frame::FreeSlot::queued);
        let timestamp = Timestamp { us: 0, clock: Clock::Monotonic };
        let meta = FrameMeta { sequence: 7, timestamp, bytes_used: [0; MAX_PLANES], flags: FrameFlags::default() };
        Frame::new(buffer.clone(), meta, Slots::dequeued(&slots, 0).unwrap())
    }

    fn buffers(code: &str, count: u32) -> Vec<Buffer> {
        let layout = Layout::packed(Format::parse(code).unwrap().0, (16, 16), 1).unwrap();
        Buffer::allocate_all(Allocator::Plain, &layout, &Room::default(), count).unwrap()
    }

    /// Fills a picture with bytes that all differ from their neighbours.
    fn paint(buffer: &Buffer) {
        let bytes: Vec<u8> = (0..buffer.layout().memory_len(0)).map(|i| (i * 7 % 251) as u8).collect();
        buffer.map(Access::ReadWrite).unwrap()[0].write(0, &bytes);
    }

    #[test]
    fn a_wrong_copy_is_noticed() {
        for (from, to) in [("XR24", "XR24"), ("YUYV", "XR24"), ("NV12", "RG16"), ("GREY", "XR24")] {
            let source = &buffers(from, 1)[0];
            paint(source);
            let frame = frame(source);
            let mut copier = Copier::by_cpu(source.layout(), buffers(to, 2), false).unwrap();
            copier.check();
            for place in 0..ROWS {
                drop(copier.copy(&frame, place).unwrap().unwrap());
            }
            assert_eq!(
                (copier.verdict().unwrap().checked, copier.verdict().unwrap().wrong),
                (ROWS, 0),
                "{from} to {to}"
            );
            // Wrong by more than a step in every row, so that it does not matter which rows are looked at.
            let copy = copier.copy(&frame, 40).unwrap().unwrap();
            let mut mapping = copy.buffer().map(Access::ReadWrite).unwrap();
            for row in 0..16 {
                let place = copy.buffer().layout().planes()[0];
                let at = place.stride as usize * row + 1;
                let mut byte = [0];
                mapping[0].read(at, &mut byte);
                mapping[0].write(at, &[byte[0] ^ 0x80]);
            }
            copier.check.as_mut().unwrap().compare(&frame, &copy, 41).unwrap();
            let verdict = copier.verdict().unwrap();
            assert_eq!((verdict.wrong, verdict.first_wrong), (1, Some((41, 7))), "{from} to {to}");
        }
    }

    /// Each byte of a copy is compared; of a conversion one row of eight, others each time: a bad byte that each of eight frames has is
    /// found in one of them, in whichever row it is, and that frame is named.
    #[test]
    fn one_bad_byte_is_found_when_its_row_is_looked_at() {
        for (from, to, found) in [("XR24", "XR24", ROWS), ("YUYV", "XR24", 1), ("NV12", "RG16", 1), ("GREY", "XR24", 1)]
        {
            let source = &buffers(from, 1)[0];
            paint(source);
            let frame = frame(source);
            for row in 0..16 {
                let mut copier = Copier::by_cpu(source.layout(), buffers(to, 2), false).unwrap();
                let mut check = Check::new(source.layout(), copier.layout());
                for place in 0..ROWS {
                    let copy = copier.copy(&frame, place).unwrap().unwrap();
                    let at = copy.buffer().layout().planes()[0].stride as usize * row + 1;
                    let mut mapping = copy.buffer().map(Access::ReadWrite).unwrap();
                    let mut byte = [0];
                    mapping[0].read(at, &mut byte);
                    mapping[0].write(at, &[byte[0] ^ 0x80]);
                    check.compare(&frame, &copy, place).unwrap();
                }
                let first = if found == ROWS { 0 } else { row as u64 % ROWS };
                let verdict = check.verdict;
                assert_eq!((verdict.checked, verdict.wrong), (ROWS, found), "{from} to {to}, row {row}");
                assert_eq!(verdict.first_wrong, Some((first, 7)), "{from} to {to}, row {row}");
            }
        }
    }

    #[test]
    fn views_of_copies_do_not_starve_it() {
        let source = &buffers("YUYV", 1)[0];
        let frame = frame(source);
        let mut copier = Copier::by_cpu(source.layout(), buffers("XR24", 2), false).unwrap();
        let views: Vec<_> = (0..6)
            .map(|place| copier.copy(&frame, place).unwrap().unwrap().view("keeper").unwrap())
            .collect();
        assert_eq!((views.len(), copier.dropped()), (6, 0));
        let detached: u64 = copier.view_copies().iter().map(|copies| copies.count).sum();
        assert_eq!(detached, 4);
        let frames: Vec<_> = (6..8).map(|place| copier.copy(&frame, place).unwrap().unwrap()).collect();
        assert!(copier.copy(&frame, 8).unwrap().is_none(), "both are held as frames");
        assert_eq!((frames.len(), copier.dropped()), (2, 1));
    }
}
