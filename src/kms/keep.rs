//! The newest picture stays on screen while its source changes: in a buffer of the display's own.

use super::Display;
use crate::convert::Converter;
use crate::endpoint::Sink;
use crate::error::{Error, Kind, Result};
use crate::format::MAX_PLANES;
use crate::frame::{Frame, Room, Slots};
use crate::memory::Span;

impl Display {
    /// The cause of these copies in the [`Ledger`](crate::ledger::Ledger).
    pub const KEPT: &'static str = "the last picture, kept while the source changes";

    /// Copies the frame on screen into a buffer of the card's, shows that, and gives up the frame.
    pub(super) fn keep_picture(&mut self) -> Result<()> {
        // On a way that has shown nothing yet, what is on screen has been kept before.
        if !self.way.as_ref().is_some_and(|way| way.lit) {
            return Ok(());
        }
        // The commit waits for a frame that is still on its way, and that frame may wait for a fence, without limit.
        self.pending_acquired()?;
        let Some(frame) = self.on_screen.clone() else { return Ok(()) };
        let layout = *frame.buffer().layout();
        let buffer = self
            .allocate(&layout, &Room::default(), 1)?
            .pop()
            .ok_or_else(|| self.about_keeping())?;
        let mut converter =
            Converter::new(&layout, buffer.layout()).map_err(|cause| self.about_keeping().because(cause))?;
        let reader = frame.read()?;
        let mut writer = buffer.write()?;
        let memory: [Span<'_>; MAX_PLANES] = [0, 1, 2, 3].map(|memory| reader.memory(memory).unwrap_or(Span::EMPTY));
        let bytes = converter.copy(&memory, &mut writer);
        writer.end()?;
        drop(reader);
        // A slot of nobody's queue: it goes with the frame.
        let slots = Slots::new(1);
        slots.take_free().for_each(crate::frame::FreeSlot::queued);
        let lease = Slots::dequeued(&slots, 0).ok_or_else(|| self.about_keeping())?;
        let kept = Frame::new(buffer, *frame.meta(), lease);
        drop(frame);
        self.replace_picture(kept)?;
        self.ledger.enter(Display::KEPT, bytes);
        Ok(())
    }

    fn about_keeping(&self) -> Error {
        Error::new(Kind::Invalid, "keep the picture on", self.card().name())
    }
}
