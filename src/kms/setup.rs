//! What is set once, before frames flow: connector, mode, and the plane's place and colours.

use drm::control::Device as _;
use drm_ffi::{DRM_MODE_OBJECT_CONNECTOR, DRM_MODE_OBJECT_CRTC, DRM_MODE_OBJECT_PLANE};

use super::Card;
use super::atomic::Request;
use super::card::Properties;
use super::route::Route;
use super::saved::COLOUR_TABLES;
use crate::error::{Context, Error, Kind, Result};
use crate::format::{Encoding, Layout, Range};

/// The properties to set once.
#[derive(Debug)]
pub(super) struct Setup {
    /// Planes and connectors to turn off, and the connector to turn on.
    around: Request,
    /// The plane's place, colours and blending, without the framebuffer.
    plane: Vec<(u32, u64)>,
    active: u32,
    mode: u32,
    /// What changes the colours of the whole picture.
    colour_tables: Vec<u32>,
    pub framebuffer: u32,
    /// Properties for fences, which every atomic driver has had since Linux 4.10 (drm_universal_plane_init, drm_crtc_init_with_planes).
    pub in_fence: Option<u32>,
    pub out_fence: Option<u32>,
}

impl Setup {
    pub(super) fn new(card: &Card, route: &Route, layout: &Layout) -> Result<Setup> {
        let resources = card.resource_handles().context("list the outputs of", || card.name())?;
        let connectors = resources.connectors().iter().map(|&handle| u32::from(handle));
        let mut around = Request::default();
        for connector in connectors {
            let properties = card.properties(connector, DRM_MODE_OBJECT_CONNECTOR)?;
            let (crtc_id, current) = property(card, &properties, "CRTC_ID")?;
            if connector == route.connector {
                around.object(connector).set(crtc_id, u64::from(route.crtc));
            } else if current == u64::from(route.crtc) {
                around.object(connector).set(crtc_id, 0);
            }
        }
        for plane in card.planes()?.iter().filter(|plane| plane.id != route.plane) {
            let properties = card.properties(plane.id, DRM_MODE_OBJECT_PLANE)?;
            let (crtc_id, current) = property(card, &properties, "CRTC_ID")?;
            if current == u64::from(route.crtc) {
                let (framebuffer, _) = property(card, &properties, "FB_ID")?;
                around.object(plane.id).set(framebuffer, 0).set(crtc_id, 0);
            }
        }
        let crtc = card.properties(route.crtc, DRM_MODE_OBJECT_CRTC)?;
        let properties = card.properties(route.plane, DRM_MODE_OBJECT_PLANE)?;
        Ok(Setup {
            around,
            plane: plane_values(card, &properties, route, layout)?,
            active: property(card, &crtc, "ACTIVE")?.0,
            mode: property(card, &crtc, "MODE_ID")?.0,
            colour_tables: COLOUR_TABLES.iter().filter_map(|&name| Some(crtc.get(name)?.0)).collect(),
            framebuffer: property(card, &properties, "FB_ID")?.0,
            in_fence: properties.get("IN_FENCE_FD").map(|&(property, _)| property),
            out_fence: crtc.get("OUT_FENCE_PTR").map(|&(property, _)| property),
        })
    }

    pub(super) fn request(&self, route: &Route, framebuffer: u32, mode: u32) -> Request {
        let mut request = self.around.clone();
        request.object(route.crtc).set(self.active, 1).set(self.mode, u64::from(mode));
        for &table in &self.colour_tables {
            // None: a table that another program has left would change our pixels.
            request.set(table, 0);
        }
        request.object(route.plane).set(self.framebuffer, u64::from(framebuffer));
        for &(property, value) in &self.plane {
            request.set(property, value);
        }
        request
    }
}

/// Where the picture lies and how its pixels are taken: unscaled, unturned, opaque, with the colours that the layout states.
fn plane_values(card: &Card, properties: &Properties, route: &Route, layout: &Layout) -> Result<Vec<(u32, u64)>> {
    let (width, height) = layout.size();
    // Source coordinates are 16.16 fixed point; positions are signed, in two's complement (drm_plane.c).
    let signed = |value: i32| i64::from(value).cast_unsigned();
    let required = [
        ("CRTC_ID", u64::from(route.crtc)),
        ("SRC_X", 0),
        ("SRC_Y", 0),
        ("SRC_W", u64::from(width) << 16),
        ("SRC_H", u64::from(height) << 16),
        ("CRTC_X", signed(route.at.0)),
        ("CRTC_Y", signed(route.at.1)),
        ("CRTC_W", u64::from(width)),
        ("CRTC_H", u64::from(height)),
    ];
    let mut values = Vec::with_capacity(required.len() + 5);
    for (name, value) in required {
        values.push((property(card, properties, name)?.0, value));
    }
    // Planes without one of these do what it would say anyway.
    let mut optional = |name: &str, value: Option<u64>| {
        if let (Some(&(property, _)), Some(value)) = (properties.get(name), value) {
            values.push((property, value));
        }
    };
    // DRM_MODE_ROTATE_0 is bit 0; full opacity is 0xffff.
    optional("rotation", Some(1));
    optional("alpha", Some(0xffff));
    let number = |name: &str, value: &str| card.enum_value(properties.get(name)?.0, value);
    optional("pixel blend mode", number("pixel blend mode", "Pre-multiplied"));
    if layout.format().is_yuv() {
        let encoding = match layout.colour().encoding {
            Encoding::Bt601 => "ITU-R BT.601 YCbCr",
            Encoding::Bt709 => "ITU-R BT.709 YCbCr",
            Encoding::Bt2020 => "ITU-R BT.2020 YCbCr",
        };
        let range = match layout.colour().range {
            Range::Limited => "YCbCr limited range",
            Range::Full => "YCbCr full range",
        };
        optional("COLOR_ENCODING", number("COLOR_ENCODING", encoding));
        optional("COLOR_RANGE", number("COLOR_RANGE", range));
    }
    Ok(values)
}

fn property(card: &Card, properties: &Properties, name: &str) -> Result<(u32, u64)> {
    let lacks = || {
        let error = Error::new(Kind::Unsupported, "set a mode on", card.name());
        error.because(format!("its driver has no property {name}"))
    };
    properties.get(name).copied().ok_or_else(lacks)
}

/// The mode as the bytes that a `MODE_ID` blob holds.
pub(super) fn mode_bytes(route: &Route) -> Vec<u8> {
    let mode = route.mode;
    let start = std::ptr::from_ref(&mode).cast::<u8>();
    // SAFETY: `drm_mode_modeinfo` is a C structure of integers without padding (drm_mode.h: 68 bytes), here a live copy.
    unsafe { std::slice::from_raw_parts(start, size_of_val(&mode)) }.to_vec()
}
