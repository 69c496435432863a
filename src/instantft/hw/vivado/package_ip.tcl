# Packages core.v as an IP core in ./ip:  vivado -mode batch -source package_ip.tcl
# NOT TRIED: written from Vivado's documentation; there was no Vivado to run it.
set here [file normalize [file dirname [info script]]]
create_project -force -part @PART@ package [file join $here package]
add_files -norecurse [list [file join $here core.v]]
set_property top core [current_fileset]
update_compile_order -fileset sources_1
ipx::package_project -root_dir [file join $here ip] -vendor instantft -library user -taxonomy /UserIP \
    -import_files -force -set_current true
set ip [ipx::current_core]
set_property name instantft $ip
set_property display_name {InstantFT fine-tuning core} $ip
set_property version 1.0 $ip
ipx::infer_bus_interface ap_clk xilinx.com:signal:clock_rtl:1.0 $ip
ipx::infer_bus_interface ap_rst_n xilinx.com:signal:reset_rtl:1.0 $ip
set polarity [ipx::add_bus_parameter POLARITY [ipx::get_bus_interfaces ap_rst_n -of_objects $ip]]
set_property value ACTIVE_LOW $polarity
foreach bus {s_axi_control m_axi_gmem0 m_axi_gmem1} {
    ipx::associate_bus_interfaces -busif $bus -clock ap_clk $ip
}
set map [ipx::get_memory_maps s_axi_control -of_objects $ip]
if {[llength $map] == 0} {
    set map [ipx::add_memory_map s_axi_control $ip]
    set_property slave_memory_map_ref s_axi_control [ipx::get_bus_interfaces s_axi_control -of_objects $ip]
}
if {[llength [ipx::get_address_blocks -of_objects $map]] == 0} {
    set block [ipx::add_address_block registers $map]
    set_property range 256 $block
    set_property width 32 $block
}
ipx::create_xgui_files $ip
ipx::update_checksums $ip
ipx::check_integrity $ip
ipx::save_core $ip
close_project
