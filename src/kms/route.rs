//! The way to a screen: which connector, CRTC, mode and plane show a picture of some format and size.

use drm::control::{Device as _, ResourceHandles, connector};
use drm_ffi::drm_mode_modeinfo;

use super::Card;
use super::offers::{ModeOffer, PlaneOffer};
use crate::endpoint::{JoinError, Refusal, Rung};
use crate::error::{Context, Error, Kind};
use crate::format::{Format, Layout};

/// The way to a screen.
#[derive(Clone, Debug)]
pub(super) struct Route {
    pub connector: u32,
    pub connector_name: String,
    pub crtc: u32,
    /// The CRTC's place in the card's list, which names its folder in debugfs.
    pub crtc_index: usize,
    pub plane: u32,
    pub mode: drm_mode_modeinfo,
    /// Where the picture's upper left corner lies on the mode, in pixels.
    pub at: (i32, i32),
}

impl Route {
    pub(super) fn mode_size(&self) -> (u32, u32) {
        ModeOffer::of(&self.mode).size
    }

    /// Time from one picture to the next, in µs.
    pub(super) fn period_us(&self) -> u64 {
        // A refresh of 0 is a mode without a clock; then there is no period.
        (1e6 / ModeOffer::of(&self.mode).refresh.max(1e-3)) as u64
    }

    /// All ways that fit, best first: connectors in the card's order, the CRTC that a connector has before others, primary
    /// planes before overlays. A driver may still refuse one of them, which only a test commit tells.
    ///
    /// `keep` is the way that shows pictures now: its connector counts as connected, and its mode stays if it holds the picture, because
    /// another one would turn the screen off for a moment.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if nothing is connected; a refusal if no plane takes the format or no mode holds the picture.
    pub(super) fn candidates(
        card: &Card,
        layout: &Layout,
        rate: Option<f64>,
        keep: Option<&Route>,
    ) -> Result<Vec<Route>, JoinError> {
        let resources = card.resource_handles().context("list the outputs of", || card.name())?;
        let mut connected = Vec::new();
        let mut all = Vec::new();
        for &handle in resources.connectors() {
            let info = card.connector(handle)?;
            if info.interface() == connector::Interface::Writeback {
                continue;
            }
            all.push(info.to_string());
            if info.state() == connector::State::Connected
                || keep.is_some_and(|keep| keep.connector == u32::from(handle))
            {
                connected.push(info);
            }
        }
        if connected.is_empty() {
            let error = Error::new(Kind::NotFound, "show anything on", card.name());
            let because = format!("nothing is connected to {}", all.join(", "));
            return Err(error
                .because(because)
                .repair("connect a display, or choose another card")
                .into());
        }
        let planes = card.planes()?;
        let fitting: Vec<_> = planes.iter().filter(|plane| takes(plane, layout.format())).collect();
        if fitting.is_empty() {
            return Err(lacks_format(card, layout.format()).into());
        }
        let mut routes = Vec::new();
        for info in &connected {
            let kept = keep
                .filter(|keep| keep.connector == u32::from(info.handle()))
                .map(|keep| keep.mode);
            let holds = |mode: &drm_mode_modeinfo| {
                let (width, height) = ModeOffer::of(mode).size;
                width >= layout.width() && height >= layout.height()
            };
            let chosen = || choose_mode(info.modes(), layout.size(), rate);
            let Some(mode) = kept.filter(holds).or_else(chosen) else { continue };
            for (crtc_index, crtc) in crtcs_of(card, &resources, info) {
                let mut here: Vec<_> = fitting
                    .iter()
                    .filter(|plane| plane.crtcs.iter().any(|&handle| u32::from(handle) == crtc))
                    .collect();
                here.sort_by_key(|plane| !plane.primary);
                let (width, height) = ModeOffer::of(&mode).size;
                routes.extend(here.iter().map(|plane| Route {
                    connector: info.handle().into(),
                    connector_name: info.to_string(),
                    crtc,
                    crtc_index,
                    plane: plane.id,
                    mode,
                    at: (centre(width, layout.width()), centre(height, layout.height())),
                }));
            }
        }
        if routes.is_empty() {
            return Err(too_large(&connected, layout).into());
        }
        Ok(routes)
    }
}

/// The offset that puts `inner` in the middle of `outer`; even, so that subsampled chroma stays aligned.
fn centre(outer: u32, inner: u32) -> i32 {
    i32::try_from((outer.saturating_sub(inner) / 2) & !1).unwrap_or(0)
}

fn takes(plane: &PlaneOffer, format: Format) -> bool {
    !plane.cursor && format.drm().is_some_and(|code| plane.formats.contains(&code))
}

/// The CRTCs that can drive a connector, with their indices, the one that does now first.
fn crtcs_of(card: &Card, resources: &ResourceHandles, info: &connector::Info) -> Vec<(usize, u32)> {
    let encoders = info.encoders().iter().filter_map(|&encoder| card.get_encoder(encoder).ok());
    let current = info
        .current_encoder()
        .and_then(|encoder| card.get_encoder(encoder).ok()?.crtc());
    let possible: Vec<_> = encoders
        .flat_map(|encoder| resources.filter_crtcs(encoder.possible_crtcs()))
        .collect();
    let mut crtcs: Vec<_> = resources
        .crtcs()
        .iter()
        .enumerate()
        .filter(|(_, crtc)| possible.contains(crtc))
        .collect();
    crtcs.sort_by_key(|&(_, &crtc)| Some(crtc) != current);
    crtcs.into_iter().map(|(index, &crtc)| (index, u32::from(crtc))).collect()
}

/// The mode that equals the picture, else the smallest that holds it and shows as many pictures a second as come; a slower one only
/// if there is no other. Of several of one size the one whose refresh is nearest to the rate without being lower, else the fastest.
///
/// A mode of 59.94 Hz is slower than a camera of 60 frames a second: frames would queue up before it, a frame time late each, and
/// one in a thousand be lost.
fn choose_mode(
    modes: &[drm::control::Mode],
    (width, height): (u32, u32),
    rate: Option<f64>,
) -> Option<drm_mode_modeinfo> {
    let modes = modes.iter().map(|&mode| drm_mode_modeinfo::from(mode));
    let modes = modes.map(|mode| (ModeOffer::of(&mode), mode));
    // Interlaced modes show half a picture at a time.
    let progressive = modes.filter(|(_, mode)| mode.flags & drm_ffi::DRM_MODE_FLAG_INTERLACE == 0);
    let holding = progressive.filter(|(offer, _)| offer.size.0 >= width && offer.size.1 >= height);
    let rate = rate.unwrap_or(0.0);
    let key = |offer: &ModeOffer| {
        let area = u64::from(offer.size.0) * u64::from(offer.size.1);
        let slow = offer.refresh < rate * (1.0 - SAME_REFRESH);
        (offer.size != (width, height), slow, area)
    };
    let distance = |offer: &ModeOffer| if key(offer).1 { -offer.refresh } else { offer.refresh - rate };
    let order = |a: &ModeOffer, b: &ModeOffer| key(a).cmp(&key(b)).then(distance(a).total_cmp(&distance(b)));
    holding.min_by(|(a, _), (b, _)| order(a, b)).map(|(_, mode)| mode)
}

/// Clocks in kHz make refreshes that differ by less than this share from the one that is meant.
const SAME_REFRESH: f64 = 0.0005;

fn lacks_format(card: &Card, format: Format) -> Refusal {
    let formats: Vec<_> = card
        .formats()
        .unwrap_or_default()
        .iter()
        .map(|format| format.to_string())
        .collect();
    Refusal {
        rung: Rung::Exported,
        step: "plane formats",
        errno: None,
        why: format!("no plane of {} scans out {format}", card.name()),
        repair: format!("ask the camera for a format that the display takes: {}", formats.join(" ")),
    }
}

fn too_large(connected: &[connector::Info], layout: &Layout) -> Refusal {
    let modes = connected.iter().flat_map(connector::Info::modes);
    let largest = modes
        .map(|&mode| ModeOffer::of(&mode.into()).size)
        .max_by_key(|&(w, h)| u64::from(w) * u64::from(h));
    let (width, height) = largest.unwrap_or((0, 0));
    Refusal {
        rung: Rung::Exported,
        step: "mode choice",
        errno: None,
        why: format!("no mode of the display holds {}x{}", layout.width(), layout.height()),
        repair: format!("ask the camera for at most {width}x{height}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(width: u16, height: u16, refresh: u32) -> drm::control::Mode {
        let mut raw: drm_mode_modeinfo = drm_mode_modeinfo::default();
        (raw.hdisplay, raw.vdisplay, raw.htotal, raw.vtotal) = (width, height, width, height);
        raw.clock = u32::from(width) * u32::from(height) * refresh / 1000;
        raw.into()
    }

    /// 848x480 at 60.00 Hz rather than 640x480 at 59.94, for 60 frames a second.
    #[test]
    fn a_mode_that_is_a_little_slow_is_not_taken() {
        let timing = |clock, size: (u16, u16), total: (u16, u16)| {
            let mut raw = drm_mode_modeinfo { clock, ..drm_mode_modeinfo::default() };
            (raw.hdisplay, raw.vdisplay, raw.htotal, raw.vtotal) = (size.0, size.1, total.0, total.1);
            drm::control::Mode::from(raw)
        };
        let modes = [timing(25175, (640, 480), (800, 525)), timing(33750, (848, 480), (1088, 517))];
        assert_eq!(chosen(&modes, (640, 360), 60.0), Some((848, 480, 60)));
        assert_eq!(chosen(&modes, (640, 360), 59.94), Some((640, 480, 60)));
        assert_eq!(chosen(&modes, (640, 360), 30.0), Some((640, 480, 60)));
    }

    fn chosen(modes: &[drm::control::Mode], size: (u32, u32), rate: f64) -> Option<(u32, u32, u32)> {
        let mode = choose_mode(modes, size, Some(rate))?;
        let offer = ModeOffer::of(&mode);
        Some((offer.size.0, offer.size.1, offer.refresh.round() as u32))
    }

    #[test]
    fn the_equal_mode_then_the_smallest_that_holds() {
        let modes =
            [mode(1920, 1080, 60), mode(640, 480, 60), mode(1280, 720, 60), mode(640, 480, 75), mode(640, 480, 30)];
        assert_eq!(chosen(&modes, (1280, 720), 60.0), Some((1280, 720, 60)));
        assert_eq!(chosen(&modes, (640, 360), 60.0), Some((640, 480, 60)));
        assert_eq!(chosen(&modes, (640, 360), 70.0), Some((640, 480, 75)));
        assert_eq!(chosen(&modes, (640, 360), 120.0), Some((640, 480, 75)), "none is fast enough");
        assert_eq!(chosen(&modes[..3], (640, 360), 75.0), Some((640, 480, 60)), "none is fast enough");
        assert_eq!(chosen(&modes[..2], (1920, 1080), 75.0), Some((1920, 1080, 60)), "the equal one, however slow");
        assert_eq!(chosen(&modes, (640, 360), 25.0), Some((640, 480, 30)));
        assert_eq!(chosen(&modes, (4096, 2160), 60.0), None);
    }

    #[test]
    fn pictures_are_centred_on_even_pixels() {
        assert_eq!((centre(480, 360), centre(641, 640), centre(100, 100), centre(10, 7)), (60, 0, 0, 0));
        assert_eq!(centre(13, 6), 2);
    }
}
