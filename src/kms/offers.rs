//! What a card offers: connectors, their modes, and the formats of its planes.

use drm::control::{Device as _, ResourceHandles, connector, crtc, plane};
use drm_ffi::drm_mode_modeinfo;

use super::Card;
use crate::error::{Context, Result};
use crate::format::{Format, Fourcc};

/// A mode of a connector.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct ModeOffer {
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// Pictures a second.
    pub refresh: f64,
    /// Whether the display prefers it.
    pub preferred: bool,
}

impl ModeOffer {
    pub(super) fn of(mode: &drm_mode_modeinfo) -> ModeOffer {
        let total = f64::from(mode.htotal) * f64::from(mode.vtotal) * f64::from(mode.vscan.max(1));
        // The clock is in kHz (drm_mode.h).
        let refresh = if total > 0.0 { f64::from(mode.clock) * 1000.0 / total } else { f64::from(mode.vrefresh) };
        ModeOffer {
            size: (u32::from(mode.hdisplay), u32::from(mode.vdisplay)),
            refresh,
            preferred: mode.type_ & drm_ffi::DRM_MODE_TYPE_PREFERRED != 0,
        }
    }
}

/// A connector of a card.
#[derive(Clone, PartialEq, Debug)]
pub struct ConnectorOffer {
    /// Its name, as in `HDMI-A-1`.
    pub name: String,
    /// Whether a display is connected.
    pub connected: bool,
    /// The display's modes.
    pub modes: Vec<ModeOffer>,
}

/// A plane and the CRTCs that it can serve.
#[derive(Clone, Debug)]
pub(super) struct PlaneOffer {
    pub id: u32,
    pub primary: bool,
    pub cursor: bool,
    pub crtcs: Vec<crtc::Handle>,
    pub formats: Vec<Fourcc>,
}

impl Card {
    /// The connectors of the card, without those for writeback.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn connectors(&self) -> Result<Vec<ConnectorOffer>> {
        let about = || self.name();
        let resources = self.resource_handles().context("list the connectors of", about)?;
        let offers = resources.connectors().iter().map(|&handle| {
            let info = self.connector(handle)?;
            let modes = info.modes().iter().map(|&mode| ModeOffer::of(&mode.into())).collect();
            Ok(ConnectorOffer { name: info.to_string(), connected: info.state() == connector::State::Connected, modes })
        });
        offers.collect()
    }

    /// The formats that at least one plane of the card (cursors apart) scans out and that are known here, best first.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn formats(&self) -> Result<Vec<Format>> {
        let planes = self.planes()?;
        let scans_out = |format: &Format| {
            format
                .drm()
                .is_some_and(|code| planes.iter().any(|plane| !plane.cursor && plane.formats.contains(&code)))
        };
        Ok(Format::all().filter(scans_out).collect())
    }

    /// One connector, probed if the kernel has never done so.
    pub(super) fn connector(&self, handle: connector::Handle) -> Result<connector::Info> {
        let about = || self.name();
        let info = self.get_connector(handle, false).context("ask a connector of", about)?;
        if info.state() == connector::State::Disconnected || !info.modes().is_empty() {
            return Ok(info);
        }
        self.get_connector(handle, true).context("probe a connector of", about)
    }

    pub(super) fn planes(&self) -> Result<Vec<PlaneOffer>> {
        let about = || self.name();
        let resources = self.resource_handles().context("list the outputs of", about)?;
        let handles = self.plane_handles().context("list the planes of", about)?;
        handles.into_iter().map(|handle| self.plane(&resources, handle)).collect()
    }

    fn plane(&self, resources: &ResourceHandles, handle: plane::Handle) -> Result<PlaneOffer> {
        let info = self.get_plane(handle).context("ask a plane of", || self.name())?;
        let id = u32::from(handle);
        let properties = self.properties(id, drm_ffi::DRM_MODE_OBJECT_PLANE)?;
        let kind = properties.get("type").map_or(0, |&(_, value)| value);
        Ok(PlaneOffer {
            id,
            primary: kind == u64::from(drm_ffi::DRM_PLANE_TYPE_PRIMARY),
            cursor: kind == u64::from(drm_ffi::DRM_PLANE_TYPE_CURSOR),
            crtcs: resources.filter_crtcs(info.possible_crtcs()),
            formats: info.formats().iter().map(|&code| Fourcc(code)).collect(),
        })
    }
}
