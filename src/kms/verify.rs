//! Proof that a display showed what was captured: predicted against reported CRC, picture by picture.
//!
//! Verified are displays of the driver vkms, whose CRC is computed over the composed picture and can be predicted to the bit in
//! every format ([`predict`](super::predict)). The CRCs of other drivers are computed by secret polynomials over a signal that
//! has passed scaling, dithering and colour correction; for those there is no verdict but a refusal.

use nix::sys::utsname::uname;

use super::Card;
use super::crc::CrcStream;
use super::flip::Flip;
use super::predict::{Flavour, Predictor};
use super::route::Route;
use crate::endpoint::{Predicted, Verdict};
use crate::error::{Error, Kind, Result};
use crate::format::Layout;
use crate::frame::Frame;

/// Longest wait for a CRC, in ms. Under emulation a large picture takes vkms more than a second.
const CRC_TIMEOUT_MS: u16 = 20_000;

/// Compares what a display reports with what was captured.
pub(super) struct Verifier {
    predictor: Predictor,
    stream: Option<CrcStream>,
    predicted: Predicted,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Verifier({:?})", self.verdict())
    }
}

impl Verifier {
    /// A verifier for pictures of `layout` on `route`.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if the display's CRC cannot be predicted.
    pub(super) fn new(card: &Card, route: &Route, layout: &Layout) -> Result<Verifier> {
        let no = |why: String| {
            let error = Error::new(Kind::Unsupported, "verify what is shown on", card.name()).because(why);
            error.repair("run without --verify, or on vkms")
        };
        let driver = &card.info().driver;
        if driver != "vkms" {
            return Err(no(format!("how driver {driver} computes its CRCs is not known")));
        }
        let release = uname()
            .map(|name| name.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        let flavour = Flavour::from_release(&release);
        let flavour =
            flavour.ok_or_else(|| no(format!("how vkms of Linux {release} composes pictures is not known")))?;
        let predictor =
            Predictor::new(flavour, route.mode_size(), layout, route.at).map_err(|why| no(why.to_string()))?;
        Ok(Verifier { predictor, stream: None, predicted: Predicted::new() })
    }

    /// Predicts what the display must report for this frame, which has this place among all captured.
    ///
    /// # Errors
    /// If the frame cannot be read; [`Kind::Revoked`].
    pub(super) fn expect(&mut self, frame: &Frame, place: u64) -> Result<()> {
        let reader = frame.read()?;
        let crc = self.predictor.crc(&mut |plane, row, out| reader.row(plane, row, out));
        self.predicted.expect(frame, place, crc)
    }

    /// Starts the stream of CRCs with the first picture on screen, and checks that picture: it is there already, so any CRC
    /// that comes now is of it.
    ///
    /// # Errors
    /// If there is no CRC.
    pub(super) fn first(&mut self, card: &Card, route: &Route, frame: &Frame) -> Result<()> {
        let mut stream = CrcStream::open(card, route.crtc_index)?;
        let entry = stream.next(CRC_TIMEOUT_MS)?;
        self.stream = Some(stream);
        self.compare(frame, entry.crc)
    }

    /// Checks the picture that came on screen with `flip`: the CRC of that vertical blank is compared, or of the first one after it.
    /// Blocks until it is there, so that nothing can change on screen meanwhile.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn check(&mut self, frame: &Frame, flip: Flip) -> Result<()> {
        let missing = || {
            let error = Error::new(Kind::System, "verify", format!("frame {}", frame.meta().sequence));
            error.because("the display's CRCs do not tell of which vertical blank they are")
        };
        let stream = self.stream.as_mut().ok_or_else(missing)?;
        loop {
            let entry = stream.next(CRC_TIMEOUT_MS)?;
            if shows(entry.vblank.ok_or_else(missing)?, flip.vblank) {
                return self.compare(frame, entry.crc);
            }
        }
    }

    /// Reads away the CRCs of pictures that have been checked, before the commit of the next: there is room for two seconds of them.
    ///
    /// # Errors
    /// What `read` says.
    pub(super) fn forget(&mut self) -> Result<()> {
        self.stream.as_mut().map_or(Ok(()), CrcStream::forget)
    }

    /// Ends the stream of CRCs; the result stays.
    pub(super) fn end(&mut self) {
        self.stream = None;
    }

    /// The result so far.
    pub(super) fn verdict(&self) -> Verdict {
        self.predicted.verdict()
    }

    fn compare(&mut self, frame: &Frame, reported: u32) -> Result<()> {
        match self.predicted.compare(frame, reported) {
            // It is on screen, and what is there may be another picture: that is nothing to judge the display by.
            Err(error) if error.kind() == Kind::Revoked => Ok(()),
            compared => compared,
        }
    }
}

/// Whether the CRC of vertical blank `vblank` is of what came on screen at `flip`. Those before are of the picture before. That of the
/// flip itself may be lost: vkms enters one for each vertical blank that passed while it composed a picture, all at once
/// (`vkms_composer_worker`), and there is room for 127. A later one is of the same picture, because nothing was committed since.
fn shows(vblank: u32, flip: u32) -> bool {
    // Numbers wrap.
    vblank.wrapping_sub(flip).cast_signed() >= 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crc_that_was_lost_is_made_up_for_by_the_next() {
        assert!(!shows(6, 7), "of the picture before");
        assert!(shows(7, 7) && shows(8, 7) && shows(200, 7));
        assert!(!shows(u32::MAX, 0) && shows(0, u32::MAX), "numbers wrap");
    }
}
