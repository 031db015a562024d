//! What a display shows now: written back by the hardware, or read from the memory that its planes scan out.

pub(super) mod compose;

use std::fmt;
use std::os::fd::AsFd;

use drm::control::{Device as _, crtc};
use nix::libc;

use super::card::Properties;
use super::offers::PlaneOffer;
use super::{Card, framebuffer, writeback};
use crate::error::{Context, Error, Kind, Result};
use crate::format::{Colour, Encoding, Range, Rgb};
use crate::frame::Buffer;
use compose::{Blend, Layer, compose};

/// How a [`Snapshot`] is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    /// The memory that the planes scan out is read and composed here. Works beside the process that drives the display.
    Framebuffers,
    /// The display's hardware writes what it shows to memory. Only the process that drives the display can ask it to.
    Writeback,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Method::Framebuffers => "framebuffers",
            Method::Writeback => "writeback",
        })
    }
}

/// What a display showed.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Width of the display's mode in pixels.
    pub width: u32,
    /// Its height.
    pub height: u32,
    /// Red, green and blue of each pixel, row after row.
    pub rgb: Vec<u8>,
    /// How it was made.
    pub method: Method,
    /// What was tried first and why it did not work; what the picture leaves out or only comes near to.
    pub notes: Vec<String>,
}

/// The display that a snapshot is of.
#[derive(Clone, Debug)]
pub(super) struct Output {
    pub crtc: crtc::Handle,
    /// The size of its mode.
    pub size: (u32, u32),
    /// What it shows where no plane is.
    background: Rgb,
    /// The properties by which it changes its colours after composition.
    corrections: Vec<&'static str>,
}

/// How often the planes are looked at again because a framebuffer was gone before it could be opened. Whoever flips 60
/// times a second leaves 16 ms for it.
const ATTEMPTS: usize = 10;

impl Snapshot {
    /// Takes a snapshot of the first display that `card` drives, without changing what it shows.
    ///
    /// Without a method the writeback is tried first, and [`Method::Framebuffers`] taken where this process cannot be
    /// DRM master, or the hardware writes nothing back. `card` may be the one that this process drives the display
    /// with: it stays master if it is. While a writeback runs, `card` lists its writeback connectors, and hardware
    /// that needs a modeset for it may go dark for a moment. Nobody should import into the same `card` at the same
    /// time: DRM counts no users of its buffer handles.
    ///
    /// Framebuffers are read while the display's owner may draw the next picture: they can be torn, and what a display
    /// changes after composition (gamma, say) is not in them. Such things are in [`Snapshot::notes`].
    ///
    /// # Errors
    /// [`Kind::NotFound`] if no display is on; [`Kind::Permission`] if this process is neither root nor DRM master;
    /// [`Kind::Unsupported`] for memory that is not in rows and formats that are not known here.
    pub fn take(card: &Card, via: Option<Method>) -> Result<Snapshot> {
        let mut notes = Vec::new();
        let output = Output::first(card, &mut notes)?;
        let (method, rgb) = match via {
            Some(Method::Writeback) => (Method::Writeback, writeback::read(card, &output)?),
            Some(Method::Framebuffers) => (Method::Framebuffers, framebuffers(card, &output, &mut notes)?),
            None => match writeback::read(card, &output) {
                Ok(rgb) => (Method::Writeback, rgb),
                Err(error) => {
                    notes.push(format!("no writeback: {}", error.line()));
                    (Method::Framebuffers, framebuffers(card, &output, &mut notes)?)
                }
            },
        };
        let (width, height) = output.size;
        Ok(Snapshot { width, height, rgb, method, notes })
    }
}

impl Output {
    /// The first that is on.
    fn first(card: &Card, notes: &mut Vec<String>) -> Result<Output> {
        let resources = card.resource_handles().context("list the displays of", || card.name())?;
        let mut on = Vec::new();
        for &crtc in resources.crtcs() {
            let properties = card.properties(crtc.into(), drm_ffi::DRM_MODE_OBJECT_CRTC)?;
            let info = drm_ffi::mode::get_crtc(card.as_fd(), crtc.into());
            let info = info.context("ask a display controller of", || card.name())?;
            if value(&properties, "ACTIVE") == Some(1) && info.mode_valid != 0 {
                on.push((crtc, info.mode, properties));
            }
        }
        let Some((crtc, mode, properties)) = on.first() else {
            let nothing = Error::new(Kind::NotFound, "take a snapshot of", card.name());
            return Err(nothing.because(format!("nothing is shown on {}", card.name())));
        };
        if on.len() > 1 {
            notes.push(format!("{} displays are on; this is the one of CRTC {}", on.len(), u32::from(*crtc)));
        }
        let mut corrections = vec!["DEGAMMA_LUT", "CTM", "GAMMA_LUT"];
        corrections.retain(|name| value(properties, name).is_some_and(|blob| blob != 0));
        let size = (u32::from(mode.hdisplay), u32::from(mode.vdisplay));
        Ok(Output { crtc: *crtc, size, background: background(properties), corrections })
    }
}

fn value(properties: &Properties, name: &str) -> Option<u64> {
    properties.get(name).map(|&(_, value)| value)
}

/// `BACKGROUND_COLOR`, where there is one: 16 bits each of alpha, red, green and blue (`DRM_ARGB64_PREP`).
fn background(properties: &Properties) -> Rgb {
    let bytes = value(properties, "BACKGROUND_COLOR").unwrap_or(0).to_le_bytes();
    Rgb::new(bytes[5], bytes[3], bytes[1])
}

/// Composes what the planes scan out.
fn framebuffers(card: &Card, output: &Output, notes: &mut Vec<String>) -> Result<Vec<u8>> {
    let mut attempt = 1;
    let (layers, more) = loop {
        match layers(card, output) {
            // The owner removed a framebuffer after its plane was looked at.
            Err(error) if error.errno() == Some(libc::ENOENT) && attempt < ATTEMPTS => attempt += 1,
            other => break other?,
        }
    };
    notes.extend(more);
    for name in &output.corrections {
        notes.push(format!("the display changes the colours after composition ({name}); that is left out"));
    }
    if layers.is_empty() {
        notes.push("no plane of the display is on: it shows its background alone".to_owned());
    }
    compose(output.size, output.background, &layers)
}

/// What lies on the screen, the lowest first, with notes.
fn layers(card: &Card, output: &Output) -> Result<(Vec<Layer>, Vec<String>)> {
    let (mut layers, mut notes) = (Vec::new(), Vec::new());
    for plane in card.planes()? {
        let properties = card.properties(plane.id, drm_ffi::DRM_MODE_OBJECT_PLANE)?;
        let value = |name| value(&properties, name);
        // Object numbers have 32 bits.
        let framebuffer = value("FB_ID").unwrap_or(0) as u32;
        if value("CRTC_ID") != Some(u64::from(u32::from(output.crtc))) || framebuffer == 0 {
            continue;
        }
        // If one plane has a zpos all have (`drm_blend.c`); else a cursor is above, and the primary plane below, all
        // others.
        let rank = if plane.primary { 0 } else { 1 + u64::from(plane.cursor) };
        let height = value("zpos").unwrap_or(rank);
        match layer(card, &plane, framebuffer, &properties, &mut notes) {
            Ok(layer) => layers.push((height, plane.id, layer)),
            // A picture without its pointer is still that picture; without anything else it would be a wrong one.
            Err(error) if plane.cursor && error.errno() != Some(libc::ENOENT) => {
                notes.push(format!("the cursor is left out: {}", error.line()));
            }
            Err(error) => return Err(error),
        }
    }
    layers.sort_by_key(|&(height, id, _)| (height, id));
    Ok((layers.into_iter().map(|(_, _, layer)| layer).collect(), notes))
}

/// What one plane shows.
fn layer(
    card: &Card,
    plane: &PlaneOffer,
    framebuffer: u32,
    properties: &Properties,
    notes: &mut Vec<String>,
) -> Result<Layer> {
    let number = |name| value(properties, name).unwrap_or(0);
    let says = |name: &str, word: &str| {
        properties
            .get(name)
            .is_some_and(|&(id, value)| card.enum_value(id, word) == Some(value))
    };
    let encoding = if says("COLOR_ENCODING", "ITU-R BT.709 YCbCr") {
        Encoding::Bt709
    } else if says("COLOR_ENCODING", "ITU-R BT.2020 YCbCr") {
        Encoding::Bt2020
    } else {
        Encoding::Bt601
    };
    let range = if says("COLOR_RANGE", "YCbCr full range") { Range::Full } else { Range::Limited };
    let blend = if says("pixel blend mode", "None") {
        Blend::Ignore
    } else if says("pixel blend mode", "Coverage") {
        Blend::Coverage
    } else {
        // What all did before there was the property, and what it starts as.
        Blend::Premultiplied
    };
    let buffer = framebuffer::open(card, framebuffer, Colour { encoding, range })?;
    let layer = Layer {
        // Properties carry 64 bits; of these the kernel has 32, with a sign for the place.
        source: ["SRC_X", "SRC_Y", "SRC_W", "SRC_H"].map(|name| number(name) as u32),
        at: (number("CRTC_X") as i32, number("CRTC_Y") as i32),
        size: (number("CRTC_W") as u32, number("CRTC_H") as u32),
        rotation: number("rotation") as u32,
        alpha: value(properties, "alpha")
            .and_then(|alpha| u16::try_from(alpha).ok())
            .unwrap_or(u16::MAX),
        blend,
        buffer,
    };
    let (id, layout) = (plane.id, layer.buffer.layout());
    if layer.is_scaled() {
        notes.push(format!("plane {id} is scaled; here each pixel is the nearest one, the display may mix them"));
    }
    if layout.modifier().is_none() {
        notes.push(format!("the kernel does not say how the memory of plane {id} is tiled; it was read as rows"));
    }
    if layout.format().is_yuv() && !properties.contains_key("COLOR_ENCODING") {
        notes.push(format!("plane {id} does not say what its YUV means; it was taken as {}", layout.colour()));
    }
    Ok(layer)
}

/// The picture in a buffer, as it is.
pub(super) fn picture(buffer: Buffer) -> Result<Vec<u8>> {
    compose(buffer.layout().size(), Rgb::default(), &[Layer::whole(buffer)])
}
