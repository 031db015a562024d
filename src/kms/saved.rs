//! What was on screen before, so that it can be put back.

use std::os::fd::AsFd;

use drm::control::Device as _;
use drm_ffi::{DRM_MODE_OBJECT_CONNECTOR, DRM_MODE_OBJECT_CRTC, DRM_MODE_OBJECT_PLANE};

use super::Card;
use super::atomic::{CommitFlags, Request};
use super::card::Properties;
use super::route::Route;
use crate::error::{Context, Result};

/// The properties that a display of ours changes, and so those to put back.
const CONNECTOR: &[&str] = &["CRTC_ID"];
const CRTC: &[&str] = &["ACTIVE", "MODE_ID"];
/// Tables that change the colours of the whole picture.
pub(super) const COLOUR_TABLES: &[&str] = &["DEGAMMA_LUT", "CTM", "GAMMA_LUT"];
pub(super) const PLANE: &[&str] = &[
    "FB_ID",
    "CRTC_ID",
    "SRC_X",
    "SRC_Y",
    "SRC_W",
    "SRC_H",
    "CRTC_X",
    "CRTC_Y",
    "CRTC_W",
    "CRTC_H",
    "COLOR_ENCODING",
    "COLOR_RANGE",
    "rotation",
    "alpha",
    "pixel blend mode",
];

/// The state of a CRTC, of what it drives and of what it shows, as it was.
#[derive(Debug)]
pub(super) struct Saved {
    request: Request,
    /// The same with every framebuffer off, for when one of them is gone.
    dark: Request,
    /// The mode and the tables as data, with their places in the requests: the kernel frees a blob with its last use, so the old
    /// number may be gone by then.
    blobs: Vec<(usize, Vec<u8>)>,
}

/// A property blob of ours. Destroyed on drop; what is in use stays in use.
#[derive(Debug)]
pub(super) struct Blob<'a> {
    card: &'a Card,
    pub id: u32,
}

impl<'a> Blob<'a> {
    pub(super) fn new(card: &'a Card, data: &mut [u8]) -> Result<Blob<'a>> {
        let blob = drm_ffi::mode::create_property_blob(card.as_fd(), data);
        let blob = blob.context("store a mode or colours for", || card.name())?;
        Ok(Blob { card, id: blob.blob_id })
    }
}

impl Drop for Blob<'_> {
    fn drop(&mut self) {
        // It can only fail if the blob is gone, which is the aim.
        let _ = drm_ffi::mode::destroy_property_blob(self.card.as_fd(), self.id);
    }
}

impl Saved {
    /// Reads the state of everything that showing pictures on `route` can change.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn read(card: &Card, route: &Route) -> Result<Saved> {
        let resources = card.resource_handles().context("list the outputs of", || card.name())?;
        let mut saved = Saved { request: Request::default(), dark: Request::default(), blobs: Vec::new() };
        let uses = |properties: &Properties| {
            properties
                .get("CRTC_ID")
                .is_some_and(|&(_, crtc)| crtc == u64::from(route.crtc))
        };
        for &handle in resources.connectors() {
            let connector = u32::from(handle);
            let properties = card.properties(connector, DRM_MODE_OBJECT_CONNECTOR)?;
            if connector == route.connector || uses(&properties) {
                saved.keep(connector, &properties, CONNECTOR, &[]);
            }
        }
        for plane in card.planes()? {
            let properties = card.properties(plane.id, DRM_MODE_OBJECT_PLANE)?;
            if plane.id == route.plane || uses(&properties) {
                saved.keep(plane.id, &properties, PLANE, &["FB_ID", "CRTC_ID"]);
            }
        }
        let properties = card.properties(route.crtc, DRM_MODE_OBJECT_CRTC)?;
        saved.keep(route.crtc, &properties, CRTC, &[]);
        saved.keep_blob(card, &properties, "MODE_ID")?;
        for name in COLOUR_TABLES {
            if let Some(&(property, _)) = properties.get(*name) {
                saved.request.set(property, 0);
                saved.dark.set(property, 0);
                saved.keep_blob(card, &properties, name)?;
            }
        }
        Ok(saved)
    }

    fn keep(&mut self, object: u32, properties: &Properties, names: &[&str], dark: &[&str]) {
        self.request.object(object);
        self.dark.object(object);
        for name in names {
            if let Some(&(property, value)) = properties.get(*name) {
                self.request.set(property, value);
                self.dark.set(property, if dark.contains(name) { 0 } else { value });
            }
        }
    }

    /// Keeps the data of the blob that is the value added last, in place of its number.
    fn keep_blob(&mut self, card: &Card, properties: &Properties, name: &str) -> Result<()> {
        let (Some(place), Some(&(_, blob))) = (self.request.len().checked_sub(1), properties.get(name)) else {
            return Ok(());
        };
        if blob != 0 {
            let about = || format!("{name} of {}", card.name());
            self.blobs.push((place, card.get_property_blob(blob).context("read", about)?));
        }
        Ok(())
    }

    /// Puts back that a plane shows nothing, if it is not among those put back already: one that came into use later.
    ///
    /// # Errors
    /// What the kernel says.
    pub(super) fn turn_off(&mut self, card: &Card, plane: u32) -> Result<()> {
        if self.request.has(plane) {
            return Ok(());
        }
        let properties = card.properties(plane, DRM_MODE_OBJECT_PLANE)?;
        for request in [&mut self.request, &mut self.dark] {
            request.object(plane);
            for name in ["FB_ID", "CRTC_ID"] {
                if let Some(&(property, _)) = properties.get(name) {
                    request.set(property, 0);
                }
            }
        }
        Ok(())
    }

    /// Puts everything back. Where a framebuffer that was shown is gone, its plane stays dark.
    ///
    /// # Errors
    /// What the kernel says to the dark form.
    pub(super) fn restore(&mut self, card: &Card) -> Result<()> {
        // Kept until the commit is done.
        let mut made = Vec::with_capacity(self.blobs.len());
        for (place, data) in &mut self.blobs {
            let blob = Blob::new(card, data)?;
            for request in [&mut self.request, &mut self.dark] {
                request.set_at(*place, u64::from(blob.id));
            }
            made.push(blob);
        }
        let flags = CommitFlags { allow_modeset: true, ..CommitFlags::default() };
        if self.request.try_commit(card, flags).is_ok() {
            return Ok(());
        }
        self.dark.commit(card, flags, "put back the picture on")
    }
}
