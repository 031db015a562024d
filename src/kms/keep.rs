//! The newest picture stays on screen while its source changes: in a buffer of the display's own.

use super::Display;
use super::atomic::CommitFlags;
use crate::convert::Converter;
use crate::error::{Error, Kind, Result};
use crate::frame::{Frame, Room, Slots};
use crate::memory::{MAX_SPANS, spans};

impl Display {
    /// The cause of these copies in the [`Ledger`](crate::ledger::Ledger).
    pub const KEPT: &'static str = "the last picture, kept while the source changes";
}

/// Copies the frame on screen into a buffer of the card's, shows that, and gives up the frame.
pub(super) fn keep_picture(display: &mut Display) -> Result<()> {
    let Some(frame) = display.frame_on_screen() else { return Ok(()) };
    let layout = *frame.buffer().layout();
    let buffer = display.card().make_buffer(&layout, &Room::default())?;
    let about = || Error::new(Kind::Invalid, "keep the picture on", display.card().name());
    let mut converter = Converter::new(&layout, buffer.layout()).map_err(|cause| about().because(cause))?;
    let reader = frame.buffer().read()?;
    let mut writer = buffer.write()?;
    let bytes = converter.copy(&spans(|memory| reader.memory(memory)), &mut writer);
    writer.end()?;
    drop(reader);
    // A slot of nobody's queue: it goes with the frame.
    let slots = Slots::new(1);
    if let Some(slot) = slots.take_free().next() {
        slot.queued();
    }
    let lease = Slots::dequeued(&slots, 0).ok_or_else(about)?;
    let kept = Frame::new(buffer, *frame.meta(), lease);
    display.replace_picture(kept, CommitFlags::default())?;
    display.enter_copy(Display::KEPT, bytes);
    Ok(())
}

#[allow(dead_code)]
const _: usize = MAX_SPANS;
